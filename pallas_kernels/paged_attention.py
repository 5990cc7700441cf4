"""Attention of a ragged batch of queries over the paged KV cache: one function, several backends."""

from __future__ import annotations

from typing import NoReturn

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Shaped

from jserve.errors import ConfigError
from jserve.pallas_kernels import native, pallas_triton, xla
from jserve.pallas_kernels.backends import Backend
from jserve.pallas_kernels.metadata import BatchMetadata, KVScales
from jserve.pallas_kernels.online_softmax import Scoring
from jserve.pallas_kernels.quantization import QUANTIZED_DTYPES, is_quantized


def paged_attention(
    q: Float[Array, "tokens heads dim"],
    k_cache: Shaped[Array, "blocks block_size kv_heads dim"],
    v_cache: Shaped[Array, "blocks block_size kv_heads dim"],
    meta: BatchMetadata,
    *,
    scale: float,
    backend: Backend,
    scales: KVScales | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "tokens heads dim"]:
    """Each query attends to its row's KV up to its own position, which the cache already holds.

    Query head h reads kv head `h // (heads // kv_heads)`. Scores and softmax are float32 whatever the dtype. Padding
    tokens come out as zeros, and what lies in blocks or slots past a row's context never reaches a result.

    `scales` belong to a cache of int8 or float8_e4m3fn codes, and only to one. With `window`, a query sees itself and
    the `window - 1` tokens before it, and what lies before those may be garbage too. With `soft_cap`, scores s become
    soft_cap * tanh(s / soft_cap). The native backend has none of the three: ConfigError.

    In the native backend a query's result is the same bits whatever its batch mates and however its prompt was
    chunked; in the pallas backend it is so to rounding, for contexts are split by the length of the whole batch's.
    Works under jit and, with local shapes, inside shard_map over kv heads.
    """
    if backend != "native":
        return partial_attention(
            q, k_cache, v_cache, meta, scale=scale, backend=backend, scales=scales, window=window, soft_cap=soft_cap
        )[0]
    _check_shapes(q, k_cache, v_cache, scales)
    if scales is not None or window is not None or soft_cap is not None:
        _refuse_native("scales, window and soft_cap")
    return native.attend(q, k_cache, v_cache, meta, scale)


def partial_attention(
    q: Float[Array, "tokens heads dim"],
    k_cache: Shaped[Array, "blocks block_size kv_heads dim"],
    v_cache: Shaped[Array, "blocks block_size kv_heads dim"],
    meta: BatchMetadata,
    *,
    scale: float,
    backend: Backend,
    scales: KVScales | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "tokens heads dim"], Float32[Array, "tokens heads"]]:
    """`paged_attention`, and the natural logarithm of each query's sum of exp(score), for `merge_partials`.

    It is -inf, and the output zero, for a query that sees nothing: a padding token, or the one query of a row of which
    this holder has no KV (context_len 0). Not in the native backend: ConfigError.
    """
    _check_shapes(q, k_cache, v_cache, scales)
    scoring = Scoring(scale, window, soft_cap)
    match backend:
        case "native":
            _refuse_native("lse")
        case "xla":
            return xla.attend(q, k_cache, v_cache, scales, meta, scoring)
        case "pallas":
            return pallas_triton.attend(q, k_cache, v_cache, scales, meta, scoring)


def _refuse_native(what: str) -> NoReturn:
    raise ConfigError(f"the native attention backend does not have {what}: set runner.attention_backend to 'xla'")


def _check_shapes(q: Array, k_cache: Array, v_cache: Array, scales: KVScales | None) -> None:
    heads, dim = q.shape[1:]
    kv_heads, kv_dim = k_cache.shape[2:]
    if heads % kv_heads or dim != kv_dim or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"queries {q.shape} do not fit a cache of keys {k_cache.shape} and values {v_cache.shape}: "
            "heads must be a multiple of kv_heads, and head_dim the same"
        )
    if is_quantized(k_cache.dtype) and k_cache.dtype == v_cache.dtype and scales is not None:
        expected = (k_cache.shape[0], kv_heads)
        if not scales.k.shape == scales.v.shape == expected or not scales.k.dtype == scales.v.dtype == jnp.float32:
            found = f"{scales.k.shape} and {scales.v.shape} in {scales.k.dtype}"
            raise ValueError(f"scales are {found}, and the cache needs {expected} in float32")
    elif scales is not None:
        raise ValueError(
            f"the cache is {k_cache.dtype} and {v_cache.dtype}; scales need {' or '.join(QUANTIZED_DTYPES)}"
        )
    elif not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"queries are {q.dtype}, the cache {k_cache.dtype} and {v_cache.dtype}: use one dtype")
