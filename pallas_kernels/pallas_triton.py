"""The Pallas backend, lowered through Triton for NVIDIA GPUs; on CPU it is interpreted, for tests.

One program takes a tile of queries of one row and one kv head: its rows are the (query, head of the group) pairs,
padded to a power of two. It walks the row's context through the block table with an online softmax. Tuning for the
A100 and a Hopper specialisation go behind this same function.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float

from jserve.errors import ConfigError
from jserve.pallas_kernels.metadata import BatchMetadata
from jserve.pallas_kernels.xla import make_tiles

_MIN_DOT = 16
"""Triton's matrix products are at least this long on each side."""
_TILE_ROWS = 64
_KV_TOKENS = 32
_MAX_HEAD_DIM = 256
_MAX_ELEMENTS = 2**31 - 1
"""Triton computes 32-bit offsets."""


def unsupported(head_dim: int) -> str | None:
    """Why heads of this size cannot run, or None. Sizes that are not a power of two are padded with masked loads."""
    if head_dim > _MAX_HEAD_DIM:
        return f"head_dim is {head_dim}, and the pallas attention backend takes at most {_MAX_HEAD_DIM}"
    return None


def attend(
    q: Float[Array, "tokens heads dim"],
    k_cache: Float[Array, "blocks block_size kv_heads dim"],
    v_cache: Float[Array, "blocks block_size kv_heads dim"],
    meta: BatchMetadata,
    scale: float,
) -> Float[Array, "tokens heads dim"]:
    if k_cache.size > _MAX_ELEMENTS:
        raise ConfigError(
            f"a layer's keys are {k_cache.size} numbers on one device, and the pallas attention backend addresses at "
            f"most {_MAX_ELEMENTS}: set cache.device_blocks lower or tp higher"
        )
    call = functools.partial(_attend, scale=scale)
    result: Array = jax.lax.platform_dependent(
        q,
        k_cache,
        v_cache,
        meta,
        cpu=functools.partial(call, interpret=True),
        default=functools.partial(call, interpret=False),
    )
    return result


def _attend(q: Array, k_cache: Array, v_cache: Array, meta: BatchMetadata, *, scale: float, interpret: bool) -> Array:
    tokens, heads, _ = q.shape
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    mean = max(1, tokens // meta.context_len.shape[0])
    queries = max(1, min(_TILE_ROWS // group, mean))
    tiles = make_tiles(meta, tokens, queries)
    kernel = functools.partial(
        _kernel,
        scale=scale,
        group=group,
        queries=queries,
        exact=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )
    result: Array = pl.pallas_call(
        kernel,
        grid=(tiles.row.shape[0], kv_heads),
        in_specs=[pl.no_block_spec] * 9,
        out_specs=pl.no_block_spec,
        out_shape=jax.typeof(q),
        # Tokens that no tile has, padding, keep the zeros that the output starts from.
        input_output_aliases={8: 0},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(*tiles, meta.block_table, q, k_cache, v_cache, jnp.zeros_like(q))
    return result


def _kernel(
    row_ref: Any,
    token_ref: Any,
    count_ref: Any,
    position_ref: Any,
    table_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    _: Any,
    out_ref: Any,
    *,
    scale: float,
    group: int,
    queries: int,
    exact: jax.lax.Precision | None,
) -> None:
    tile, head = pl.program_id(0), pl.program_id(1)
    row, token, count, position = row_ref[tile], token_ref[tile], count_ref[tile], position_ref[tile]
    dim, block_size = q_ref.shape[-1], k_ref.shape[1]
    rows = max(_MIN_DOT, pl.next_power_of_2(queries * group))
    dims = jnp.arange(max(_MIN_DOT, pl.next_power_of_2(dim)))
    # Rows past the live ones repeat them, so that they store the same values to the same places.
    m = jnp.arange(rows) % jnp.maximum(count * group, 1)
    where = ((token + m // group)[:, None], (head * group + m % group)[:, None], dims[None, :])
    inside = (dims < dim)[None, :] & (count > 0)
    q = plt.load(q_ref.at[where], mask=inside, other=0.0)
    query_position = position + m // group

    def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, top, total = state
        at = i * _KV_TOKENS + jnp.arange(_KV_TOKENS)
        held = at < position + count
        block = plt.load(table_ref.at[row, jnp.where(held, at // block_size, 0)], mask=held, other=0)
        kv_where = (block[:, None], (at % block_size)[:, None], head, dims[None, :])
        kv_inside = held[:, None] & (dims < dim)[None, :]
        k = plt.load(k_ref.at[kv_where], mask=kv_inside, other=0.0)
        v = plt.load(v_ref.at[kv_where], mask=kv_inside, other=0.0)
        scores = plt.dot(q, k, trans_b=True, precision=exact).astype(jnp.float32) * (scale * math.log2(math.e))
        scores = jnp.where(at[None, :] <= query_position[:, None], scores, -jnp.inf)
        # Every query sees position 0, so the maximum is finite from the first step on.
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        part = plt.dot(weights.astype(v.dtype), v, precision=exact)
        return out * shrink[:, None] + part, new_top, total * shrink + weights.sum(axis=1)

    start = (
        jnp.zeros((rows, dims.shape[0]), jnp.float32),
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    out, _, total = jax.lax.fori_loop(0, pl.cdiv(position + count, _KV_TOKENS) * (count > 0), step, start)
    out = out / jnp.where(total > 0, total, 1.0)[:, None]
    plt.store(out_ref.at[where], out.astype(out_ref.dtype), mask=inside)
