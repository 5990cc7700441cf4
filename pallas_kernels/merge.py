"""Merges partial attention: outputs over disjoint parts of a context, with the log of each one's sum of weights.

Of splits of one kernel, and of holders: instances that each hold a part of a request's KV. The sum of the outputs,
weighted by exp(lse), over the sum of these weights (FlashAttention-2, arXiv 2307.08691, section 3.1; flash-decoding).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Float32

from jserve.pallas_kernels.backends import Backend
from jserve.pallas_kernels.dispatch import by_platform
from jserve.pallas_kernels.work import Splits, Tiles

_ELEMENTS = 1024
"""Of a program of `merge_partials`."""


def merge_partials(
    out: Float[Array, "holders tokens heads dim"], lse: Float32[Array, "holders tokens heads"], *, backend: Backend
) -> tuple[Float[Array, "tokens heads dim"], Float32[Array, "tokens heads"]]:
    """The output and lse (natural logarithm) over all holders' parts, computed in float32.

    A holder with lse -inf has nothing, and whatever its output is, NaN included, it takes no part. Where no holder has
    anything, the output is zero and the lse -inf.
    """
    if out.shape[:3] != lse.shape or lse.dtype != jnp.float32:
        raise ValueError(f"outputs {out.shape} need lse of {out.shape[:3]} in float32, not {lse.shape} in {lse.dtype}")
    if backend == "pallas":
        result: tuple[Array, Array] = by_platform(_merge_partials, out, lse)
        return result
    top = lse.max(axis=0)
    weight = jnp.exp(lse - jnp.where(top == -jnp.inf, 0, top))[..., None]
    total = weight.sum(axis=0)
    merged = jnp.where(weight > 0, out.astype(jnp.float32) * weight, 0).sum(axis=0) / jnp.where(total > 0, total, 1)
    return merged.astype(out.dtype), top + jnp.log(total[..., 0])


def merge_splits(
    out: Float32[Array, "splits kv_heads rows dim"],
    lse: Float32[Array, "splits kv_heads rows"],
    tiles: Tiles,
    splits: Splits,
    result: Any,
    *,
    group: int,
    interpret: bool,
) -> tuple[Float[Array, "tokens heads dim"], Float32[Array, "tokens heads"]]:
    """Merges each tile's splits into its tokens of an array like `result`; tokens that no tile has stay undefined."""
    work = jnp.stack((splits.first, splits.parts, tiles.token, tiles.queries), axis=1)
    merged: tuple[Array, Array] = pl.pallas_call(
        functools.partial(_splits_kernel, group=group),
        grid=(out.shape[1], work.shape[0]),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=(pl.no_block_spec, pl.no_block_spec),
        out_shape=(result, jax.ShapeDtypeStruct(result.shape[:2], jnp.float32)),
        compiler_params=plt.CompilerParams(num_warps=2, num_stages=3),
        interpret=interpret,
        name="merge_splits",
    )(work, out, lse)
    return merged


def _splits_kernel(
    work_ref: Any, out_part_ref: Any, lse_part_ref: Any, out_ref: Any, lse_ref: Any, *, group: int
) -> None:
    head, tile = pl.program_id(0), pl.program_id(1)
    first, count, token, queries = (work_ref[tile, i] for i in range(4))
    rows, dim = out_part_ref.shape[2:]
    m, dims = jnp.arange(pl.next_power_of_2(rows)), jnp.arange(pl.next_power_of_2(dim))
    live = m < queries * group
    inside = live[:, None] & (dims < dim)[None, :]

    def part(i: Array) -> tuple[Array, Array]:
        out = plt.load(out_part_ref.at[first + i, head, m[:, None], dims[None, :]], mask=inside, other=0.0)
        return out, plt.load(lse_part_ref.at[first + i, head, m], mask=live, other=-jnp.inf)

    out, lse = _merged(part, count, m.shape[0], dims.shape[0])
    place = (token + jax.lax.div(m, group), head * group + jax.lax.rem(m, group))
    plt.store(out_ref.at[place[0][:, None], place[1][:, None], dims[None, :]], out.astype(out_ref.dtype), mask=inside)
    plt.store(lse_ref.at[place], lse, mask=live)


def _merge_partials(out: Array, lse: Array, *, interpret: bool) -> tuple[Array, Array]:
    holders, tokens, heads, dim = out.shape
    rows = max(1, _ELEMENTS // pl.next_power_of_2(dim))
    flat = out.reshape(holders, tokens * heads, dim)
    merged: tuple[Array, Array] = pl.pallas_call(
        functools.partial(_partials_kernel, rows=rows),
        grid=(pl.cdiv(tokens * heads, rows),),
        in_specs=[pl.no_block_spec] * 2,
        out_specs=(pl.no_block_spec, pl.no_block_spec),
        out_shape=(
            jax.ShapeDtypeStruct(flat.shape[1:], out.dtype),
            jax.ShapeDtypeStruct(flat.shape[1:2], jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="merge_partials",
    )(flat, lse.reshape(holders, -1))
    return merged[0].reshape(out.shape[1:]), merged[1].reshape(lse.shape[1:])


def _partials_kernel(out_part_ref: Any, lse_part_ref: Any, out_ref: Any, lse_ref: Any, *, rows: int) -> None:
    holders, all_rows, dim = out_part_ref.shape
    m = pl.program_id(0) * rows + jnp.arange(rows)
    dims = jnp.arange(pl.next_power_of_2(dim))
    live = m < all_rows
    inside = live[:, None] & (dims < dim)[None, :]

    def part(i: Array) -> tuple[Array, Array]:
        out = plt.load(out_part_ref.at[i, m[:, None], dims[None, :]], mask=inside, other=0.0)
        return out.astype(jnp.float32), plt.load(lse_part_ref.at[i, m], mask=live, other=-jnp.inf)

    out, lse = _merged(part, jnp.int32(holders), rows, dims.shape[0])
    plt.store(out_ref.at[m[:, None], dims[None, :]], out.astype(out_ref.dtype), mask=inside)
    plt.store(lse_ref.at[m], lse, mask=live)


def _merged(part: Any, count: Array, rows: int, dims: int) -> tuple[Array, Array]:
    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, total = state
        more, lse = part(i)
        new_top = jnp.maximum(top, lse)
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weight, shrink = jnp.exp(lse - base), jnp.exp(top - base)
        # Chosen, not multiplied: an empty part's output may be NaN.
        more = jnp.where((weight > 0)[:, None], more * weight[:, None], 0.0)
        return out * shrink[:, None] + more, new_top, total * shrink + weight

    start = (
        jnp.zeros((rows, dims), jnp.float32),
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    out, top, total = jax.lax.fori_loop(0, count, step, start)
    filled = jnp.where(total > 0, total, 1.0)
    return out / filled[:, None], jnp.where(total > 0, top + jnp.log(filled), -jnp.inf)
