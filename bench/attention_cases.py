"""Batches for the attention kernels: sizes, random inputs, and the least bytes and operations that they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jserve.pallas_kernels import Backend, BatchMetadata, KVScales, paged_attention


@dataclass(frozen=True)
class AttentionCase:
    """`batch` rows, each with `queries` new tokens at the end of a context of `context`: 1 is a decode."""

    batch: int
    context: int
    queries: int = 1
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str = ""
    """Of the cache, where it is not `dtype`: int8 or float8_e4m3fn codes."""

    @property
    def phase(self) -> str:
        return "decode" if self.queries == 1 else "prefill"

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def tokens(self) -> int:
        return self.batch * self.queries

    @property
    def blocks_per_row(self) -> int:
        return -(-self.context // self.block_size)

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def page_dtype(self) -> np.dtype[Any]:
        return jnp.dtype(self.kv_dtype or self.dtype)

    def kv_bytes(self) -> int:
        return self.batch * self.context * 2 * self.kv_heads * self.head_dim * self.page_dtype.itemsize

    def least_bytes(self) -> int:
        """KV and queries read once, results written once."""
        return self.kv_bytes() + 2 * self.tokens * self.heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    def flops(self) -> int:
        """Two products for each (query, position) pair that the causal mask leaves."""
        pairs = self.queries * (self.context - self.queries) + self.queries * (self.queries + 1) // 2
        return self.batch * pairs * 4 * self.heads * self.head_dim

    def __str__(self) -> str:
        shape = f"batch {self.batch} context {self.context} {self.heads}/{self.kv_heads}x{self.head_dim}"
        new = f" new {self.queries}" if self.queries > 1 else ""
        return f"{self.phase} {shape}{new} block {self.block_size} {self.page_dtype}"


class AttentionInputs(NamedTuple):
    """Arrays of a case, or their shapes."""

    q: Any
    k: Any
    v: Any
    meta: BatchMetadata
    scales: KVScales | None


def attention(
    case: AttentionCase, backend: Backend, *, window: int | None = None, soft_cap: float | None = None
) -> Callable[[AttentionInputs], Array]:
    """jserve's attention on the case's inputs."""

    def attend(x: AttentionInputs) -> Array:
        return paged_attention(
            x.q, x.k, x.v, x.meta, scale=case.scale, backend=backend, scales=x.scales, window=window, soft_cap=soft_cap
        )

    return attend


def shapes_of(case: AttentionCase, blocks: int, max_blocks: int, sharding: Any = None) -> AttentionInputs:
    def shape(dtype: Any, *size: int) -> Any:  # a ShapeDtypeStruct where the types ask for an Array
        return jax.ShapeDtypeStruct(size, jnp.dtype(dtype), sharding=sharding)

    pages = shape(case.page_dtype, blocks, case.block_size, case.kv_heads, case.head_dim)
    scale = shape(jnp.float32, blocks, case.kv_heads)
    return AttentionInputs(
        shape(case.dtype, case.tokens, case.heads, case.head_dim),
        pages,
        pages,
        BatchMetadata(
            query_start=shape(jnp.int32, case.batch + 1),
            context_len=shape(jnp.int32, case.batch),
            block_table=shape(jnp.int32, case.batch, max_blocks),
            kv_slot=shape(jnp.int32, case.tokens),
        ),
        KVScales(scale, scale) if case.kv_dtype else None,
    )


def random_inputs(case: AttentionCase, seed: int) -> AttentionInputs:
    """Inputs of a case, in a pool that it fills, with permuted blocks."""
    blocks = case.batch * case.blocks_per_row
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (blocks, case.block_size, case.kv_heads, case.head_dim)
    k, v = (_draw_pages(key, shape, case.page_dtype) for key in keys[1:])
    table = np.random.default_rng(seed).permutation(blocks).astype(np.int32).reshape(case.batch, -1)
    positions = np.arange(case.context - case.queries, case.context)
    slots = table[:, positions // case.block_size] * case.block_size + positions % case.block_size
    meta = BatchMetadata(
        query_start=jnp.arange(case.batch + 1, dtype=jnp.int32) * case.queries,
        context_len=jnp.full(case.batch, case.context, jnp.int32),
        block_table=jnp.asarray(table),
        kv_slot=jnp.asarray(slots.reshape(-1), jnp.int32),
    )
    q = _draw(keys[0], (case.tokens, case.heads, case.head_dim), jnp.dtype(case.dtype))
    scale = jnp.full((blocks, case.kv_heads), 2.0**-6, jnp.float32)
    return AttentionInputs(q, k, v, meta, KVScales(scale, scale) if case.kv_dtype else None)


@partial(jax.jit, static_argnums=(1, 2))
def _draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    drawn: Array = jax.random.normal(key, shape, dtype)
    return drawn


@partial(jax.jit, static_argnums=(1, 2))
def _draw_pages(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Random pages; beyond a thousand they repeat, since drawing a whole pool takes several times its memory."""
    wide = jnp.dtype(jnp.bfloat16) if dtype.itemsize == 1 else dtype
    drawn = jax.random.normal(key, (min(shape[0], 1024), *shape[1:]), wide)
    few = (drawn * 32 if dtype == jnp.int8 else drawn).astype(dtype)
    pages: Array = few[jnp.arange(shape[0]) % few.shape[0]]
    return pages
