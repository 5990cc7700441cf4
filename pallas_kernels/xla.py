"""The portable backend: flash-style attention in plain JAX, for any platform and as a reference.

Programs depend on the shapes of the bucket alone: how far a context reaches is a loop bound, not a shape. Queries are
gathered into tiles of one row each, and all tiles walk their contexts together, one stretch of blocks at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Float32, Int32, Shaped

from jserve.pallas_kernels.metadata import BatchMetadata, KVScales
from jserve.pallas_kernels.online_softmax import Scoring
from jserve.pallas_kernels.work import make_tiles

_MAX_TILE_QUERIES = 64
_STRETCH_TOKENS = 64


def tile_queries(tokens: int, rows: int) -> int:
    """A power of two near the mean query length that a full bucket can have, so that few tiles are mostly empty."""
    return min(_MAX_TILE_QUERIES, 1 << (max(1, tokens // rows).bit_length() - 1))


class _Softmax(NamedTuple):
    """Online softmax: the weighted sum of values so far, the largest score, the sum of weights."""

    out: Float[Array, "tiles queries kv_heads group dim"]
    top: Float[Array, "tiles queries kv_heads group"]
    total: Float[Array, "tiles queries kv_heads group"]


def attend(
    q: Float[Array, "tokens heads dim"],
    k_cache: Shaped[Array, "blocks block_size kv_heads dim"],
    v_cache: Shaped[Array, "blocks block_size kv_heads dim"],
    scales: KVScales | None,
    meta: BatchMetadata,
    scoring: Scoring,
) -> tuple[Float[Array, "tokens heads dim"], Float32[Array, "tokens heads"]]:
    """Output and lse."""
    tokens, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    queries = tile_queries(tokens, meta.context_len.shape[0])
    tiles = make_tiles(meta, tokens, queries)
    offset = jnp.arange(queries, dtype=jnp.int32)
    token = jnp.where(offset < tiles.queries[:, None], tiles.token[:, None] + offset, tokens)
    q_tiles = q.at[token].get(mode="fill", fill_value=0).astype(jnp.float32) * scoring.scale
    q_tiles = q_tiles.reshape(-1, queries, kv_heads, heads // kv_heads, dim)
    query_position = (tiles.position[:, None] + offset)[..., None]
    context = tiles.context()
    table = meta.block_table[tiles.row]
    stretch = max(1, _STRETCH_TOKENS // block_size)

    def step(i: Array, state: _Softmax) -> _Softmax:
        column = i * stretch + jnp.arange(stretch, dtype=jnp.int32)
        block = jnp.take(table, column, axis=1, mode="clip")
        position = i * stretch * block_size + jnp.arange(stretch * block_size, dtype=jnp.int32)
        held = position < context[:, None]
        seen = (position <= query_position) & held[:, None, :]
        if scoring.window is not None:
            seen &= position > query_position - scoring.window
            held &= position > tiles.position[:, None] - scoring.window
        k, v = (_gather(*x, block) for x in zip((k_cache, v_cache), scales or (None, None), strict=True))
        # What the tile does not see may be NaN, and 0 * NaN is NaN.
        return _advance(state, q_tiles, k, jnp.where(held[..., None, None], v, 0), seen, scoring.soft_cap)

    steps = (jnp.max(context, initial=0) + stretch * block_size - 1) // (stretch * block_size)
    first = jnp.int32(0)
    if scoring.window is not None:
        seen_from = jnp.where(context > 0, tiles.position - scoring.window + 1, 2**31 - 1)
        first = jnp.maximum(jnp.min(seen_from), 0) // (stretch * block_size)
    # Derived from the queries, the first state varies over the same mesh axes as the later ones do.
    start = _Softmax(jnp.zeros_like(q_tiles), *(jnp.full_like(q_tiles[..., 0], x) for x in (-jnp.inf, 0)))
    state = jax.lax.fori_loop(first, steps, step, start)
    result = state.out / jnp.where(state.total > 0, state.total, 1)[..., None]
    lse = state.top + jnp.log(state.total)
    result, lse = (x.reshape(*token.shape, heads, *x.shape[4:]) for x in (result, lse))
    nothing = jnp.full_like(q[..., 0], -jnp.inf, jnp.float32)
    return (
        jnp.zeros_like(q).at[token].set(result.astype(q.dtype), mode="drop"),
        nothing.at[token].set(lse, mode="drop"),
    )


def write(
    k_cache: Float[Array, "blocks block_size kv_heads dim"],
    v_cache: Float[Array, "blocks block_size kv_heads dim"],
    k: Float[Array, "tokens kv_heads dim"],
    v: Float[Array, "tokens kv_heads dim"],
    kv_slot: Int32[Array, "tokens"],
) -> tuple[Array, Array]:
    blocks, block_size = k_cache.shape[:2]
    # A negative index would count from the end.
    slot = jnp.where(kv_slot < 0, blocks * block_size, kv_slot)
    where = (slot // block_size, slot % block_size)
    return k_cache.at[where].set(k, mode="drop"), v_cache.at[where].set(v, mode="drop")


def _gather(
    cache: Shaped[Array, "blocks block_size kv_heads dim"],
    scale: Float32[Array, "blocks kv_heads"] | None,
    block: Int32[Array, "tiles stretch"],
) -> Float32[Array, "tiles positions kv_heads dim"]:
    found = cache.at[block].get(mode="clip").astype(jnp.float32)
    if scale is not None:
        found *= scale.at[block].get(mode="clip")[:, :, None, :, None]
    return found.reshape(block.shape[0], -1, *cache.shape[2:])


def _advance(
    state: _Softmax,
    q: Float[Array, "tiles queries kv_heads group dim"],
    k: Float[Array, "tiles positions kv_heads dim"],
    v: Float[Array, "tiles positions kv_heads dim"],
    seen: Bool[Array, "tiles queries positions"],
    soft_cap: float | None,
) -> _Softmax:
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("iqkgd,itkd->iqkgt", q, k, precision=exact)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen[:, :, None, None, :], scores, -jnp.inf)
    top = jnp.maximum(state.top, scores.max(axis=-1))
    # A query that has seen nothing yet, padding, keeps top = -inf, and -inf - -inf is NaN.
    base = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(scores - base[..., None])
    shrink = jnp.exp(state.top - base)
    out = state.out * shrink[..., None] + jnp.einsum("iqkgt,itkd->iqkgd", weights, v, precision=exact)
    return _Softmax(out, top, state.total * shrink + weights.sum(axis=-1))
