"""The Pallas backend of attention, lowered through Triton for NVIDIA GPUs; on CPU it is interpreted, for tests.

Rows of few queries, decodes, go to the kernel that splits contexts, and the others to the one that takes many queries
at once; both write into one output. A bucket of no more tokens than rows has no room for a chunk worth the latter.

Triton's lowering of Pallas serves Ampere and Hopper alike. A Mosaic GPU kernel for Hopper would be chosen here, by
`tiles.family()`, once one has been measured to win there; none has, so there is none.
"""

from __future__ import annotations

import dataclasses
import functools

from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Float32

from jserve.errors import ConfigError
from jserve.pallas_kernels.decode_attention import attend_splits, tile_queries
from jserve.pallas_kernels.dispatch import by_platform
from jserve.pallas_kernels.metadata import BatchMetadata, KVScales
from jserve.pallas_kernels.online_softmax import Scoring
from jserve.pallas_kernels.prefill_attention import attend_tiles
from jserve.pallas_kernels.tiles import Kernel, Tile, choose_tile
from jserve.pallas_kernels.work import make_tiles, row_tiles

_MAX_CODES = 2**31 - 1
_MAX_32_BIT_BYTES = 2**32


def attend(
    q: Float[Array, "tokens heads dim"],
    k_cache: Float[Array, "blocks block_size kv_heads dim"],
    v_cache: Float[Array, "blocks block_size kv_heads dim"],
    scales: KVScales | None,
    meta: BatchMetadata,
    scoring: Scoring,
    *,
    decode_tile: Tile | None = None,
    prefill_tile: Tile | None = None,
) -> tuple[Float[Array, "tokens heads dim"], Float32[Array, "tokens heads"]]:
    """Output and lse. Tiles are for those who measure them; left out, they are those of the table."""
    check_addressable(k_cache)
    call = functools.partial(_attend, scoring=scoring, tiles=(decode_tile, prefill_tile))
    result: tuple[Array, Array] = by_platform(call, q, k_cache, v_cache, scales, meta)
    return result


def _attend(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    scales: KVScales | None,
    meta: BatchMetadata,
    *,
    scoring: Scoring,
    tiles: tuple[Tile | None, Tile | None],
    interpret: bool,
) -> tuple[Array, Array]:
    tokens, heads, dim = q.shape
    rows, group = meta.context_len.shape[0], heads // k_cache.shape[2]

    def sized(given: Tile | None, kernel: Kernel) -> Tile:
        tile = given or choose_tile(kernel, dim, q.dtype, k_cache.dtype, interpret=interpret)
        return dataclasses.replace(tile, rows=max(tile.rows, pl.next_power_of_2(group)))

    decode, prefill = sized(tiles[0], "decode"), sized(tiles[1], "prefill")
    few = tile_queries(group, decode.rows)
    kv = (k_cache, v_cache, scales, meta)
    if tokens <= rows:
        return attend_splits(q, *kv, make_tiles(meta, tokens, few), scoring, decode, interpret=interpret)
    decoded = attend_splits(q, *kv, row_tiles(meta, few), scoring, decode, interpret=interpret)
    chunks = make_tiles(meta, tokens, prefill.rows // group, longer_than=few)
    return attend_tiles(q, *kv, chunks, decoded, scoring, prefill, interpret=interpret)


def check_addressable(cache: Float[Array, "blocks ..."]) -> None:
    """Raises ConfigError for a cache whose numbers Pallas would address wrongly.

    It counts in 64 bits where an array has more than 2**32 bytes, else in signed 32: so only arrays of numbers of one
    byte, between 2**31 and 2**32 of them, are out of reach.
    """
    if cache.size > _MAX_CODES and cache.size * cache.dtype.itemsize <= _MAX_32_BIT_BYTES:
        raise ConfigError(
            f"a layer's keys are {cache.size} numbers of {cache.dtype.itemsize} byte on one device, and the pallas "
            f"attention backend addresses up to {_MAX_CODES}, or more than {_MAX_32_BIT_BYTES}: set "
            "cache.device_blocks lower or tp higher"
        )
