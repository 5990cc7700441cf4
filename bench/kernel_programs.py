"""Every kernel of jserve as a program of its own, ready to be compiled for GPUs that are not here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from bench.attention_cases import AttentionCase, attention, shapes_of
from bench.gpu_compile import Candidate
from bench.gpu_targets import GpuTarget
from jserve.pallas_kernels import (
    gather_blocks,
    kv_write,
    kv_write_quantized,
    merge_partials,
    scatter_blocks,
)

BLOCKS = 4096
MAX_BLOCKS = 256
MHA = AttentionCase(64, 2048, heads=40, kv_heads=40)
"""Llama-2-13B and OPT-13B."""
GQA = AttentionCase(64, 2048, kv_heads=8)
CHUNK = AttentionCase(1, 4096, 2048, heads=40, kv_heads=40)
GQA_CHUNK = AttentionCase(4, 4096, 512, kv_heads=8)

SHORT = {"40/40x128": MHA, "32/8x128 int8": AttentionCase(64, 2048, kv_heads=8, kv_dtype="int8"), "chunk": CHUNK}
ATTENTION = SHORT | {
    "32/8x128": GQA,
    "64/8x128": AttentionCase(16, 2048, heads=64, kv_heads=8),
    "28/28x128": AttentionCase(64, 2048, heads=28, kv_heads=28),
    "9/3x64": AttentionCase(64, 2048, heads=9, kv_heads=3, head_dim=64),
    "32/32x80": AttentionCase(64, 2048, head_dim=80),
    "32/32x96": AttentionCase(64, 2048, head_dim=96),
    "16/16x256": AttentionCase(64, 2048, heads=16, kv_heads=16, head_dim=256),
    "40/40x128 block 64": AttentionCase(64, 2048, heads=40, kv_heads=40, block_size=64),
    "40/40x128 block 256": AttentionCase(64, 2048, heads=40, kv_heads=40, block_size=256),
    "32/8x128 float8": AttentionCase(64, 2048, kv_heads=8, kv_dtype="float8_e4m3fn"),
    "32/8x128 float16": AttentionCase(64, 2048, kv_heads=8, dtype="float16"),
    "32/8x128 float32": AttentionCase(64, 2048, kv_heads=8, dtype="float32"),
    "chunk 32/8x128": GQA_CHUNK,
    "chunk 32/8x128 int8": AttentionCase(4, 4096, 512, kv_heads=8, kv_dtype="int8"),
    "chunk 9/3x64": AttentionCase(4, 4096, 512, heads=9, kv_heads=3, head_dim=64),
    "chunk 16/16x256": AttentionCase(4, 4096, 512, heads=16, kv_heads=16, head_dim=256),
    "chunk 32/8x128 float32": AttentionCase(4, 4096, 512, kv_heads=8, dtype="float32"),
}
BLOCK_COPIES: dict[str, tuple[int, tuple[int, ...], Any]] = {
    "llama-2-13b": (40, (16, 40, 128), jnp.bfloat16),
    "llama-2-70b tp=2 int8": (80, (16, 4, 128), jnp.int8),
}
"""Layers, a page of one layer's keys, its dtype."""


def kernel_candidates(target: GpuTarget, *, short: bool) -> list[Candidate]:
    """The functions of jserve.pallas_kernels over shapes and dtypes; `short` has each function once."""
    maker = _Maker(target)
    cases = SHORT if short else ATTENTION
    candidates = [maker.attention(name, case) for name, case in cases.items()]
    if not short:
        candidates += [
            maker.attention("32/8x128 window, soft cap", GQA, window=512, soft_cap=30.0),
            maker.attention("chunk 32/8x128 window, soft cap", GQA_CHUNK, window=512, soft_cap=30.0),
        ]
    candidates += [maker.kv_write("decodes", MHA), maker.quantized_write("decodes int8", SHORT["32/8x128 int8"])]
    if not short:
        float8 = AttentionCase(4, 4096, 512, kv_heads=8, kv_dtype="float8_e4m3fn")
        candidates += [maker.kv_write("chunk", CHUNK), maker.quantized_write("chunk float8", float8)]
    candidates.append(maker.merge(holders=4, tokens=64, heads=40, dim=128))
    for name in list(BLOCK_COPIES)[: 1 if short else None]:
        candidates += maker.block_copies(name)
    return candidates


class _Maker:
    def __init__(self, target: GpuTarget) -> None:
        mesh = target.mesh()
        self._candidate = partial(Candidate, target=target, mesh=mesh)
        self._everywhere = NamedSharding(mesh, PartitionSpec())

    def attention(self, name: str, case: AttentionCase, **options: Any) -> Candidate:
        inputs = shapes_of(case, BLOCKS, MAX_BLOCKS, self._everywhere)
        return self._candidate(
            f"attention {name}",
            lower=partial(jax.jit(attention(case, "pallas", **options)).lower, inputs),
            page_bytes=_bytes(inputs.k),
        )

    def kv_write(self, name: str, case: AttentionCase) -> Candidate:
        x = shapes_of(case, BLOCKS, MAX_BLOCKS, self._everywhere)
        new = self._shape(case.dtype, case.tokens, case.kv_heads, case.head_dim)
        write = jax.jit(partial(kv_write, backend="pallas"), donate_argnums=(0, 1))
        return self._updating(f"KV write {name}", write, (x.k, x.v), (new, new, x.meta.kv_slot))

    def quantized_write(self, name: str, case: AttentionCase) -> Candidate:
        x = shapes_of(case, BLOCKS, MAX_BLOCKS, self._everywhere)
        new = self._shape(case.dtype, case.tokens, case.kv_heads, case.head_dim)
        write = jax.jit(partial(kv_write_quantized, backend="pallas"), donate_argnums=(0, 1, 2))
        return self._updating(f"KV write {name}", write, (x.k, x.v, x.scales), (new, new, x.meta))

    def merge(self, holders: int, tokens: int, heads: int, dim: int) -> Candidate:
        out, lse = (
            self._shape(jnp.bfloat16, holders, tokens, heads, dim),
            self._shape("float32", holders, tokens, heads),
        )
        merge = jax.jit(partial(merge_partials, backend="pallas"))
        return self._candidate(f"merge of {holders} holders", lower=partial(merge.lower, out, lse))

    def block_copies(self, name: str) -> Iterator[Candidate]:
        layers, page, dtype = BLOCK_COPIES[name]
        pages = [self._shape(dtype, BLOCKS, *page)] * layers
        ids, buffer = self._shape(jnp.int32, 64), self._shape(dtype, 64, layers, 2, *page)
        gather = jax.jit(partial(gather_blocks, backend="pallas"))
        scatter = jax.jit(partial(scatter_blocks, backend="pallas"), donate_argnums=(0, 1))
        yield self._candidate(
            f"block gather {name}", lower=partial(gather.lower, pages, pages, ids), page_bytes=_bytes(pages[0])
        )
        yield self._updating(f"block scatter {name}", scatter, (pages, pages), (ids, buffer))

    def _updating(
        self, name: str, program: Callable[..., Any], donated: tuple[Any, ...], others: tuple[Any, ...]
    ) -> Candidate:
        """A program that must write where its first arguments lie."""
        leaves = jax.tree.leaves(donated)
        return self._candidate(
            name,
            lower=partial(program.lower, *donated, *others),  # type: ignore[attr-defined]
            pool_bytes=sum(map(_bytes, leaves)),
            page_bytes=_bytes(leaves[0]),
        )

    def _shape(self, dtype: Any, *size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.dtype(dtype), sharding=self._everywhere)


def _bytes(shape: Any) -> int:
    size: int = math.prod(shape.shape) * shape.dtype.itemsize
    return size
