"""Attention of prefill chunks, lowered through Triton: many queries of a row at once, causal against its history."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Float32

from jserve.pallas_kernels.metadata import BatchMetadata, KVScales
from jserve.pallas_kernels.online_softmax import (
    Pages,
    Scoring,
    load_queries,
    log_sum_exp,
    normalized,
    pieces_of,
    store_pieces,
    walk,
)
from jserve.pallas_kernels.tiles import Tile
from jserve.pallas_kernels.work import Tiles


def attend_tiles(
    q: Float[Array, "tokens heads dim"],
    k_cache: Float[Array, "blocks block_size kv_heads dim"],
    v_cache: Float[Array, "blocks block_size kv_heads dim"],
    scales: KVScales | None,
    meta: BatchMetadata,
    tiles: Tiles,
    others: tuple[Float[Array, "tokens heads dim"], Float32[Array, "tokens heads"]] | None,
    scoring: Scoring,
    tile: Tile,
    *,
    interpret: bool,
) -> tuple[Float[Array, "tokens heads dim"], Float32[Array, "tokens heads"]]:
    """Output and lse of the tiles' tokens, each of up to `tile.rows // group` queries, written into `others`' own."""
    kv_heads = k_cache.shape[2]
    group = q.shape[1] // kv_heads
    work = jnp.stack((tiles.row, tiles.token, tiles.queries, tiles.position), axis=1)
    operands = (work, meta.block_table, q, k_cache, v_cache, *(scales or ()), *(others or ()))
    aliases = {} if others is None else {len(operands) - 2: 0, len(operands) - 1: 1}
    kernel = functools.partial(
        _kernel, scoring=scoring, tile=tile, group=group, quantized=scales is not None, interpret=interpret
    )
    result: tuple[Array, Array] = pl.pallas_call(
        kernel,
        # Tiles first: programs that run together then read the same pages, which the L2 cache holds for them.
        grid=(work.shape[0], kv_heads),
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=(pl.no_block_spec, pl.no_block_spec),
        out_shape=(jax.typeof(q), jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)),
        input_output_aliases=aliases,
        compiler_params=plt.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="prefill_attention",
    )(*operands)
    return result


def _kernel(
    work_ref: Any,
    table_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    scoring: Scoring,
    tile: Tile,
    group: int,
    quantized: bool,
    interpret: bool,
) -> None:
    k_scale_ref, v_scale_ref = refs[:2] if quantized else (None, None)
    out_ref, lse_ref = refs[-2:]
    # Later queries see more and take longer: they go first, so that the short ones fill the end.
    index, head = work_ref.shape[0] - 1 - pl.program_id(0), pl.program_id(1)
    row, token, count, position = (work_ref[index, i] for i in range(4))
    pieces = pieces_of(q_ref.shape[-1])
    queries, m = load_queries(q_ref, pieces, tile.rows, token, count, position, head, group)
    end = jnp.where(count > 0, jnp.maximum(position + count, 0), 0)
    begin = jnp.int32(0)
    if scoring.window is not None:
        first_seen = jnp.maximum(position - (scoring.window - 1), 0)
        begin = jnp.minimum(jax.lax.div(first_seen, tile.kv_tokens) * tile.kv_tokens, end)
    pages = Pages(table_ref, k_ref, v_ref, k_scale_ref, v_scale_ref, row, head, tile.kv_tokens, interpret)
    state = walk(queries, pages, begin, end, scoring, check_all=False)
    live = m < count * group
    place = (token + jax.lax.div(m, group), head * group + jax.lax.rem(m, group))
    store_pieces(out_ref, place, normalized(state), pieces, live)
    plt.store(lse_ref.at[place], log_sum_exp(state), mask=live)
