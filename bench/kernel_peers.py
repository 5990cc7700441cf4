"""Other paged attentions that JAX can run, on the very inputs that jserve's gets. `bench.torch_peers` has PyTorch's.

A peer is a function from a case to something that attends: it may prepare what its own layout needs, which is not
timed, and raises Unavailable where it cannot do the case.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from bench.attention_cases import AttentionCase, AttentionInputs, attention

Prepared = Any
"""Arrays in a peer's own layout."""


class Unavailable(Exception):
    """Why a peer cannot run here, or not this case."""


class Peer(Protocol):
    """`prepare` once, then `attend` inside jit."""

    name: str

    def prepare(self, case: AttentionCase, x: AttentionInputs) -> Prepared:
        """The inputs in the peer's own layout. Raises Unavailable."""

    def attend(self, case: AttentionCase, prepared: Prepared, q: Array) -> Array:
        """The attention of these queries, in their shape."""


class Jserve:
    """Ours, by backend; "xla" is the gather path, a peer like the others."""

    def __init__(self, backend: Any) -> None:
        self.name = f"jserve_{backend}"
        self._backend = backend

    def prepare(self, case: AttentionCase, x: AttentionInputs) -> Prepared:
        return x

    def attend(self, case: AttentionCase, prepared: Prepared, q: Array) -> Array:
        return attention(case, self._backend)(prepared._replace(q=q))


class JaxPaged:
    """jax.experimental.pallas.ops.gpu.paged_attention: deprecated, decode only, heads before pages."""

    def __init__(self, k_splits: int) -> None:
        self.name = f"jax_paged_attention_{k_splits}_splits"
        self._k_splits = k_splits

    def prepare(self, case: AttentionCase, x: AttentionInputs) -> Prepared:
        if case.phase != "decode":
            raise Unavailable("it does decode alone")
        if case.kv_dtype:
            raise Unavailable("its quantised pages have another layout")
        by_head = jax.jit(lambda pages: jnp.transpose(pages, (2, 0, 1, 3)))
        return by_head(x.k), by_head(x.v), x.meta.block_table, x.meta.context_len

    def attend(self, case: AttentionCase, prepared: Prepared, q: Array) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

        k, v, table, lengths = prepared
        splits = math.gcd(self._k_splits, case.blocks_per_row)
        each = math.gcd(8, case.blocks_per_row // splits)
        out: Array = paged_attention(
            q * case.scale, k, v, table, lengths, k_splits=splits, pages_per_compute_block=each
        )
        return out.astype(q.dtype)


class CudnnPaged:
    """cuDNN's, through a private function of JAX."""

    name = "cudnn_paged_attention"

    def prepare(self, case: AttentionCase, x: AttentionInputs) -> Prepared:
        if case.kv_dtype or case.dtype == "float32":
            raise Unavailable("it takes bfloat16 and float16")
        if 1 < case.queries < case.context:
            raise Unavailable("its causal mask begins at the context's first token")
        queries = jnp.full(case.batch, case.queries, jnp.int32)
        return x.k, x.v, queries, x.meta.context_len, x.meta.block_table[:, None, :, None]

    def attend(self, case: AttentionCase, prepared: Prepared, q: Array) -> Array:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

        k, v, queries, contexts, table = prepared
        mask = MaskType.PADDING if case.phase == "decode" else MaskType.PADDING_CAUSAL
        shape = (case.batch, case.queries, case.heads, case.head_dim)
        out: Any = paged_attention(
            q.reshape(shape), k, v, queries, contexts, table, table, scale=case.scale, mask_type=mask
        )
        attended: Array = out[0] if isinstance(out, (tuple, list)) else out
        return attended.reshape(q.shape)


class CudnnContiguous:
    """jax.nn.dot_product_attention by cuDNN, on KV that lies contiguous: no paging to pay for."""

    name = "cudnn_contiguous"

    def prepare(self, case: AttentionCase, x: AttentionInputs) -> Prepared:
        if case.phase == "decode" or case.queries != case.context:
            raise Unavailable("a peer for prefill without history")
        if case.kv_dtype or case.dtype == "float32":
            raise Unavailable("it takes bfloat16 and float16")
        shape = (case.batch, -1, case.kv_heads, case.head_dim)
        line_up = jax.jit(lambda pages: pages[x.meta.block_table].reshape(shape)[:, : case.context])
        return line_up(x.k), line_up(x.v)

    def attend(self, case: AttentionCase, prepared: Prepared, q: Array) -> Array:
        shape = (case.batch, case.queries, case.heads, case.head_dim)
        out = jax.nn.dot_product_attention(
            q.reshape(shape), *prepared, scale=case.scale, is_causal=True, implementation="cudnn"
        )
        return out.reshape(q.shape)


def jax_peers() -> list[Peer]:
    return [Jserve("xla"), JaxPaged(16), JaxPaged(1), CudnnPaged(), CudnnContiguous()]


def chained(peer: Peer, case: AttentionCase, repeats: int) -> Callable[[list[Prepared], Array], tuple[Array, Array]]:
    """A program that attends `repeats` times to each prepared input, each result the next one's query: the first
    result, to be compared, and the last.

    So a program runs long enough to hide its launch, and no call can be left out or run beside another.
    """

    def run(prepared: list[Prepared], q: Array) -> tuple[Array, Array]:
        results = [q]
        for _ in range(repeats):
            for one in prepared:
                results.append(peer.attend(case, one, results[-1]))
        return results[1], results[-1]

    return run
