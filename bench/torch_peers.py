"""PyTorch's paged attentions, on the memory of JAX's own arrays: FlashInfer, and SDPA on gathered KV.

Both are optional: what is not installed is named by `Unavailable`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

import numpy as np

from bench.attention_cases import AttentionCase, AttentionInputs
from bench.kernel_peers import Unavailable

ROUNDS, LAUNCHES = 5, 20
WORKSPACE_BYTES = 256 << 20


class TorchPeer(Protocol):
    """One of PyTorch's."""

    name: str

    def prepare(self, case: AttentionCase, x: AttentionInputs) -> Callable[[], Any]:
        """A function that attends once and returns the result on the GPU. Raises Unavailable."""


class FlashInfer:
    """FlashInfer's kernels (arXiv 2501.01005), decode and prefill over pages of [block, token, head, dim]."""

    name = "flashinfer"

    def prepare(self, case: AttentionCase, x: AttentionInputs) -> Callable[[], Any]:
        torch, flashinfer = _import("torch"), _import("flashinfer")
        if case.kv_dtype or case.dtype == "float32":
            raise Unavailable("compared in bfloat16 and float16 alone")
        q, k, v = (_shared(torch, array) for array in (x.q, x.k, x.v))
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        pages = np.arange(case.batch + 1, dtype=np.int32) * case.blocks_per_row
        table = np.asarray(x.meta.block_table).reshape(-1)
        last = np.full(case.batch, (case.context - 1) % case.block_size + 1, np.int32)
        indptr, indices, last_len = (torch.from_numpy(np.array(array)).cuda() for array in (pages, table, last))
        sizes = (case.heads, case.kv_heads, case.head_dim, case.block_size)
        if case.phase == "decode":
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=case.group >= 4)
            wrapper.plan(indptr, indices, last_len, *sizes, q_data_type=q.dtype, kv_data_type=k.dtype)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            queries = torch.from_numpy(np.array(x.meta.query_start)).cuda()
            wrapper.plan(queries, indptr, indices, last_len, *sizes, causal=True, q_data_type=q.dtype)
        return lambda: wrapper.run(q, (k, v))


class Sdpa:
    """torch.nn.functional.scaled_dot_product_attention on KV gathered from the pages in the same call."""

    name = "torch_sdpa_gathered"

    def prepare(self, case: AttentionCase, x: AttentionInputs) -> Callable[[], Any]:
        torch = _import("torch")
        if case.kv_dtype:
            raise Unavailable("it has no quantised KV")
        if 1 < case.queries < case.context:
            raise Unavailable("its causal mask begins at the context's first token")
        q, k, v = (_shared(torch, array) for array in (x.q, x.k, x.v))
        table = torch.from_numpy(np.array(x.meta.block_table)).cuda().long()
        q = q.reshape(case.batch, case.queries, case.heads, case.head_dim).transpose(1, 2)
        shape = (case.batch, -1, case.kv_heads, case.head_dim)

        def gathered(pages: Any) -> Any:
            return pages[table].reshape(shape)[:, : case.context].transpose(1, 2)

        def attend() -> Any:
            out = torch.nn.functional.scaled_dot_product_attention(
                q, gathered(k), gathered(v), is_causal=case.phase == "prefill", scale=case.scale, enable_gqa=True
            )
            return out.transpose(1, 2).reshape(case.tokens, case.heads, case.head_dim)

        return attend


def torch_peers() -> list[TorchPeer]:
    return [FlashInfer(), Sdpa()]


def measure(attend: Callable[[], Any]) -> tuple[float, np.ndarray]:
    """Seconds of one call by the GPU's own events, and its result."""
    torch = _import("torch")
    result = attend().float().cpu().numpy()
    times_ms = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(LAUNCHES):
            attend()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end) / LAUNCHES)
    return median(times_ms) / 1e3, result


def _import(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken install fails in many ways
        raise Unavailable(f"{name} cannot be imported ({type(error).__name__}: {error})") from error
    if name == "torch" and not module.cuda.is_available():
        raise Unavailable("torch sees no GPU")
    return module


def _shared(torch: Any, array: Any) -> Any:
    """The same memory as a tensor."""
    array.block_until_ready()
    return torch.from_dlpack(array)
