"""Writes the step's keys and values into the paged KV cache: one function, several backends."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float, Int32

from jserve.pallas_kernels import native, xla
from jserve.pallas_kernels.backends import Backend


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
    are distinct.
    """
    if k.shape != v.shape or k.shape[1:] != k_cache.shape[2:] or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"keys {k.shape} and values {v.shape} do not fit a cache of {k_cache.shape} and {v_cache.shape}"
        )
    k, v = k.astype(k_cache.dtype), v.astype(v_cache.dtype)
    if backend == "native":
        return native.write(k_cache, v_cache, k, v, kv_slot)
    # XLA's own scatter is in place and bandwidth bound on GPUs: there is nothing for a Pallas kernel to gain yet.
    return xla.write(k_cache, v_cache, k, v, kv_slot)
