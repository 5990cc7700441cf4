"""Writes the step's keys and values into a paged KV cache of 8-bit codes, and keeps its scales valid.

What a cache holds is defined in `quantization`, to the bit: the backends write the same codes. A program, or an entry
of the XLA version's arrays, is one block with all the tokens that it gets in this step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Float32, Shaped

from jserve.errors import ConfigError
from jserve.pallas_kernels.backends import Backend
from jserve.pallas_kernels.dispatch import by_platform
from jserve.pallas_kernels.metadata import BatchMetadata, KVScales
from jserve.pallas_kernels.pallas_triton import check_addressable
from jserve.pallas_kernels.quantization import code_factor, decode, encode, is_quantized, scale_for
from jserve.pallas_kernels.work import Tiles, block_tiles

Written = tuple[
    Shaped[Array, "blocks block_size kv_heads dim"], Shaped[Array, "blocks block_size kv_heads dim"], KVScales
]


def kv_write_quantized(
    k_cache: Shaped[Array, "blocks block_size kv_heads dim"],
    v_cache: Shaped[Array, "blocks block_size kv_heads dim"],
    scales: KVScales,
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads dim"],
    meta: BatchMetadata,
    *,
    backend: Backend,
) -> Written:
    """The cache and its scales with every row's queries written to their slots, `meta.kv_slot`.

    In place when cache and scales are donated. A row's slots follow from its positions by its block table; a block
    begins anew when its first slot is written, and until it is full belongs to one row. A block whose first token has a
    slot outside the pool is left alone.
    """
    if k.shape != v.shape or k.shape[1:] != k_cache.shape[2:] or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"keys {k.shape} and values {v.shape} do not fit a cache of {k_cache.shape} and {v_cache.shape}"
        )
    if not is_quantized(k_cache.dtype) or k_cache.dtype != v_cache.dtype:
        raise ValueError(f"the cache is {k_cache.dtype} and {v_cache.dtype}: use int8 or float8_e4m3fn for both")
    if backend == "native":
        raise ConfigError(
            "the native attention backend has no quantised KV cache: set runner.attention_backend to 'xla'"
        )
    tiles = block_tiles(meta, k.shape[0], k_cache.shape[1])
    slot = meta.kv_slot[tiles.token]
    inside = (tiles.queries > 0) & (slot >= 0) & (slot < k_cache.shape[0] * k_cache.shape[1])
    # A tile without tokens keeps the block id out of the pool, where nothing is read or written.
    tiles = tiles._replace(queries=jnp.where(inside, tiles.queries, 0))
    slot = jnp.where(inside, slot, k_cache.shape[0] * k_cache.shape[1])
    if backend == "pallas":
        check_addressable(k_cache)
        k_cache, v_cache, *new = by_platform(_pallas_write, k_cache, v_cache, *scales, k, v, tiles, slot)
        return k_cache, v_cache, KVScales(*new)
    k_cache, k_scale = _xla_write(k_cache, scales.k, k, tiles, slot)
    v_cache, v_scale = _xla_write(v_cache, scales.v, v, tiles, slot)
    return k_cache, v_cache, KVScales(k_scale, v_scale)


def _xla_write(cache: Array, scales: Array, new: Array, tiles: Tiles, slot: Array) -> tuple[Array, Array]:
    size = cache.shape[1]
    block, offset = slot // size, (slot % size)[:, None]
    at = jnp.arange(size)
    fresh = ((at >= offset) & (at < offset + tiles.queries[:, None]))[..., None, None]
    token = jnp.clip(tiles.token[:, None] + at - offset, 0, new.shape[0] - 1)
    x = jnp.where(fresh, new[token].astype(jnp.float32), 0)
    old_scale = jnp.where(offset > 0, scales.at[block].get(mode="clip"), 0)
    scale = jnp.maximum(old_scale, scale_for(jnp.abs(x).max(axis=(1, 3)), cache.dtype))
    old = cache.at[block].get(mode="clip")
    held = (at < offset)[..., None, None]
    codes = jnp.where(held, _rescaled(old, (old_scale / scale)[:, None, :, None]), old)
    codes = jnp.where(fresh, encode(x / scale[:, None, :, None], cache.dtype), codes)
    return cache.at[block].set(codes, mode="drop"), scales.at[block].set(scale, mode="drop")


def _rescaled(codes: Shaped[Array, "..."], ratio: Float32[Array, "..."]) -> Shaped[Array, "..."]:
    return encode(decode(codes, jnp.float32) * (ratio * np.float32(code_factor(codes.dtype))), codes.dtype)


def _pallas_write(
    k_cache: Array,
    v_cache: Array,
    k_scale: Array,
    v_scale: Array,
    k: Array,
    v: Array,
    tiles: Tiles,
    slot: Array,
    *,
    interpret: bool,
) -> tuple[Array, Array, Array, Array]:
    work = jnp.stack((tiles.token, tiles.queries, slot), axis=1)
    caches = (k_cache, v_cache, k_scale, v_scale)
    written: tuple[Array, Array, Array, Array] = pl.pallas_call(
        _kernel,
        grid=(k.shape[1], work.shape[0]),
        in_specs=[pl.no_block_spec] * 7,
        out_specs=(pl.no_block_spec,) * 4,
        out_shape=tuple(jax.typeof(x) for x in caches),
        input_output_aliases={3 + i: i for i in range(4)},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="kv_write_quantized",
    )(work, k, v, *caches)
    return written


def _kernel(work_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
    head, tile = pl.program_id(0), pl.program_id(1)
    token, count, slot = (work_ref[tile, i] for i in range(3))
    # The caches come twice, as inputs and, the same memory, as outputs; reading goes before writing.
    for new_ref, cache_ref, scale_ref in ((k_ref, refs[4], refs[6]), (v_ref, refs[5], refs[7])):
        _write_block(new_ref, cache_ref, scale_ref, head, token, count, slot)


def _write_block(
    new_ref: Any, cache_ref: Any, scale_ref: Any, head: Array, token: Array, count: Array, slot: Array
) -> None:
    size, dim = cache_ref.shape[1], cache_ref.shape[3]
    block, offset = jax.lax.div(slot, size), jax.lax.rem(slot, size)
    at, dims = jnp.arange(pl.next_power_of_2(size)), jnp.arange(pl.next_power_of_2(dim))
    inside = (dims < dim)[None, :]
    fresh = ((at >= offset) & (at < offset + count))[:, None] & inside
    x = plt.load(new_ref.at[(token + at - offset)[:, None], head, dims[None, :]], mask=fresh, other=0.0)
    x = x.astype(jnp.float32)
    old_scale = plt.load(scale_ref.at[block, head], mask=(count > 0) & (offset > 0), other=0.0)
    scale = jnp.maximum(old_scale, scale_for(jnp.abs(x).max(), cache_ref.dtype))
    # Only a block whose scale grows has its codes read and written again: what the masks leave out costs nothing.
    held = (at < offset)[:, None] & inside & (scale > old_scale) & (count > 0)
    place = (block, at[:, None], head, dims[None, :])
    old = plt.load(cache_ref.at[place], mask=held)
    plt.store(cache_ref.at[place], _rescaled(old, old_scale / scale), mask=held)
    plt.store(cache_ref.at[place], encode(x / scale, cache_ref.dtype), mask=fresh)
    plt.store(scale_ref.at[block, head], scale, mask=count > 0)
