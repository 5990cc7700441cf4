"""Writes the step's keys and values into the paged KV cache: one function, several backends.

On GPUs this is one kernel for K and V. XLA's scatter is two, which store 16-bit numbers one by one through 32-bit
compare-and-swap loops, for it cannot know that slots are distinct. RoPE is not fused: that is to be measured first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Int32

from jserve.pallas_kernels import native, xla
from jserve.pallas_kernels.backends import Backend
from jserve.pallas_kernels.dispatch import by_platform
from jserve.pallas_kernels.pallas_triton import check_addressable

_ELEMENTS = 1024
"""Of K and of V that one program copies: 16 bytes of each a thread."""


def kv_write(
    k_cache: Float[Array, "blocks block_size kv_heads dim"],
    v_cache: Float[Array, "blocks block_size kv_heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads dim"],
    kv_slot: Int32[Array, "tokens"],
    *,
    backend: Backend,
) -> tuple[Float[Array, "blocks block_size kv_heads dim"], Float[Array, "blocks block_size kv_heads dim"]]:
    """The cache with token t's key and value at slot `kv_slot[t]` = block * block_size + offset.

    In place when the cache is donated. A slot outside the pool, as a padding token has, is dropped. Slots inside it
    are distinct. For a cache of 8-bit codes see `kv_write_quantized`.
    """
    if k.shape != v.shape or k.shape[1:] != k_cache.shape[2:] or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"keys {k.shape} and values {v.shape} do not fit a cache of {k_cache.shape} and {v_cache.shape}"
        )
    k, v = k.astype(k_cache.dtype), v.astype(v_cache.dtype)
    match backend:
        case "native":
            return native.write(k_cache, v_cache, k, v, kv_slot)
        case "xla":
            return xla.write(k_cache, v_cache, k, v, kv_slot)
        case "pallas":
            check_addressable(k_cache)
            written: tuple[Array, Array] = by_platform(_write, k_cache, v_cache, k, v, kv_slot)
            return written


def _write(
    k_cache: Array, v_cache: Array, k: Array, v: Array, kv_slot: Array, *, interpret: bool
) -> tuple[Array, Array]:
    shape, tokens = k_cache.shape, k.shape[0]
    # One row a slot: what lies in it does not matter here.
    width = shape[2] * shape[3]
    k_flat, v_flat = (x.reshape(shape[0] * shape[1], width) for x in (k_cache, v_cache))
    written: tuple[Array, Array] = pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(width, _ELEMENTS), tokens),
        in_specs=[pl.no_block_spec] * 5,
        out_specs=(pl.no_block_spec, pl.no_block_spec),
        out_shape=(jax.typeof(k_flat), jax.typeof(v_flat)),
        input_output_aliases={3: 0, 4: 1},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="kv_write",
    )(kv_slot, k.reshape(tokens, width), v.reshape(tokens, width), k_flat, v_flat)
    return written[0].reshape(shape), written[1].reshape(shape)


def _kernel(slot_ref: Any, k_ref: Any, v_ref: Any, _k: Any, _v: Any, k_cache_ref: Any, v_cache_ref: Any) -> None:
    token = pl.program_id(1)
    at = pl.program_id(0) * _ELEMENTS + jnp.arange(_ELEMENTS)
    slots, width = k_cache_ref.shape
    slot = slot_ref[token]
    inside = at < width
    kept = inside & (slot >= 0) & (slot < slots)
    k, v = (plt.load(ref.at[token, at], mask=inside, other=0) for ref in (k_ref, v_ref))
    plt.store(k_cache_ref.at[slot, at], k, mask=kept)
    plt.store(v_cache_ref.at[slot, at], v, mask=kept)
