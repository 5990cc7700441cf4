"""Attention of a ragged batch of queries over the paged KV cache: one function, several backends."""

from __future__ import annotations

from jax import Array
from jaxtyping import Float

from jserve.pallas_kernels import native, pallas_triton, xla
from jserve.pallas_kernels.backends import Backend
from jserve.pallas_kernels.metadata import BatchMetadata


def paged_attention(
    q: Float[Array, "tokens heads dim"],
    k_cache: Float[Array, "blocks block_size kv_heads dim"],
    v_cache: Float[Array, "blocks block_size kv_heads dim"],
    meta: BatchMetadata,
    *,
    scale: float,
    backend: Backend,
) -> Float[Array, "tokens heads dim"]:
    """Each query attends to its row's KV up to its own position, which the cache already holds.

    Query head h reads kv head `h // (heads // kv_heads)`. Scores and softmax are float32 whatever the dtype. Padding
    tokens come out as zeros, and what lies in blocks or slots past a row's context never reaches a result.

    In the native backend a query's result is the same bits whatever its batch mates and however its prompt was
    chunked. Works under jit and, with local shapes, inside shard_map over kv heads.
    """
    _check_shapes(q, k_cache, v_cache)
    match backend:
        case "native":
            return native.attend(q, k_cache, v_cache, meta, scale)
        case "xla":
            return xla.attend(q, k_cache, v_cache, meta, scale)
        case "pallas":
            return pallas_triton.attend(q, k_cache, v_cache, meta, scale)


def _check_shapes(q: Array, k_cache: Array, v_cache: Array) -> None:
    heads, dim = q.shape[1:]
    kv_heads, kv_dim = k_cache.shape[2:]
    if heads % kv_heads or dim != kv_dim or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"queries {q.shape} do not fit a cache of keys {k_cache.shape} and values {v_cache.shape}: "
            "heads must be a multiple of kv_heads, and head_dim the same"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"queries are {q.dtype}, the cache {k_cache.dtype} and {v_cache.dtype}: use one dtype")
