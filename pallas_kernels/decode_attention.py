"""Decode attention with split KV (flash-decoding), lowered through Triton: few queries a row, any contexts.

All contexts of the batch are cut into stretches of about equal length, and a program takes one of them for one kv head:
however few the rows, or unequal their contexts, the whole GPU reads. Each leaves a partial output and the logarithm of
its sum of weights, float32; a second kernel merges those of a tile. The query heads of a group share each load of KV.
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

from jserve.pallas_kernels.merge import merge_splits
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
from jserve.pallas_kernels.tiles import Tile, multiprocessors
from jserve.pallas_kernels.work import Splits, Tiles, make_splits

_MAX_QUERIES = 4
"""Of a tile. More would fill the matrix unit's 16 rows when a group has one head, at the price of larger partials."""
_PROGRAMS_PER_MULTIPROCESSOR = 16
"""Several waves of the 2 to 3 that run at once, so that the last wave, part full, costs little."""
_SHORTEST_PIECE = 32
"""Of a head: 8 columns for each of 4 warps, which would repeat each other's work on fewer."""
_MIN_SPLIT_STEPS = 4
"""A shorter stretch is over before its loads have filled the pipeline."""


def tile_queries(group: int, rows: int) -> int:
    """Queries of a tile of `rows` (query, head) pairs; 0 if not even one query's group of heads fits."""
    return min(_MAX_QUERIES, rows // group)


def attend_splits(
    q: Float[Array, "tokens heads dim"],
    k_cache: Float[Array, "blocks block_size kv_heads dim"],
    v_cache: Float[Array, "blocks block_size kv_heads dim"],
    scales: KVScales | None,
    meta: BatchMetadata,
    tiles: Tiles,
    scoring: Scoring,
    tile: Tile,
    *,
    interpret: bool,
) -> tuple[Float[Array, "tokens heads dim"], Float32[Array, "tokens heads"]]:
    """Output and lse of the tiles' tokens, each of up to `tile_queries` queries. Other tokens' are left undefined."""
    heads = q.shape[1]
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    rows = tile_queries(group, tile.rows) * group
    begin = jnp.zeros_like(tiles.position)
    if scoring.window is not None:
        begin = jnp.maximum(tiles.position - (scoring.window - 1), 0)
    splits = make_splits(
        begin,
        tiles.context(),
        target=pl.cdiv(multiprocessors(interpret=interpret) * _PROGRAMS_PER_MULTIPROCESSOR, kv_heads),
        min_tokens=_MIN_SPLIT_STEPS * tile.kv_tokens,
        step=tile.kv_tokens,
    )
    out, lse = _partials(q, k_cache, v_cache, scales, meta, tiles, splits, scoring, tile, rows, interpret)
    return merge_splits(out, lse, tiles, splits, jax.typeof(q), group=group, interpret=interpret)


def _partials(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    scales: KVScales | None,
    meta: BatchMetadata,
    tiles: Tiles,
    splits: Splits,
    scoring: Scoring,
    tile: Tile,
    rows: int,
    interpret: bool,
) -> tuple[Float32[Array, "splits kv_heads rows dim"], Float32[Array, "splits kv_heads rows"]]:
    heads, dim = q.shape[1:]
    kv_heads = k_cache.shape[2]
    of = splits.tile
    work = (splits.begin, splits.end, tiles.row[of], tiles.token[of], tiles.queries[of], tiles.position[of])
    count = of.shape[0]
    operands = (jnp.stack(work, axis=1), meta.block_table, q, k_cache, v_cache, *(scales or ()))
    kernel = functools.partial(
        _kernel, scoring=scoring, tile=tile, group=heads // kv_heads, quantized=scales is not None, interpret=interpret
    )
    result: tuple[Array, Array] = pl.pallas_call(
        kernel,
        # Heads first: programs that run together then read neighbouring parts of the same pages.
        grid=(kv_heads, count),
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=(pl.no_block_spec, pl.no_block_spec),
        out_shape=(
            jax.ShapeDtypeStruct((count, kv_heads, rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((count, kv_heads, rows), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="decode_attention",
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
    head, split = pl.program_id(0), pl.program_id(1)
    begin, end, row, token, count, position = (work_ref[split, i] for i in range(6))
    # A split that is not needed has no stretch, and writes nothing.
    count = jnp.where(begin < end, count, 0)
    pieces = pieces_of(q_ref.shape[-1], _SHORTEST_PIECE)
    queries, m = load_queries(q_ref, pieces, tile.rows, token, count, position, head, group)
    pages = Pages(table_ref, k_ref, v_ref, k_scale_ref, v_scale_ref, row, head, tile.kv_tokens, interpret)
    state = walk(queries, pages, begin, end, scoring, check_all=True)
    live = m < count * group
    store_pieces(out_ref, (split, head, m), normalized(state), pieces, live)
    plt.store(lse_ref.at[split, head, m], log_sum_exp(state), mask=live)
