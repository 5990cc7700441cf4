"""Measures jserve's kernels and their peers case by case; one that fails or is late is named, never dropped."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import torch_peers
from bench.attention_cases import AttentionCase, AttentionInputs, random_inputs
from bench.kernel_peers import Jserve, Peer, Unavailable, chained, jax_peers
from bench.timing import device_seconds
from jserve.pallas_kernels import Backend, gather_blocks, scatter_blocks
from jserve.progress import Progress

FLUSH_BYTES = 256 << 20
"""KV that a repetition reads before it comes back to the same: several times any GPU's L2 cache."""
MAX_COPIES, MIN_CALLS = 8, 4
MAX_ERROR = 0.02
"""A result further than this from XLA's, relative to its norm, is another function's: bfloat16 rounds to 0.004."""


@dataclass(frozen=True)
class Sizes:
    """What to measure. The first cases are the ones that claims are made of, and that peers are measured on."""

    decode: Sequence[AttentionCase]
    prefill: Sequence[AttentionCase]
    more: Sequence[AttentionCase]
    block_copies: Sequence[tuple[str, int, tuple[int, ...], int, int]]
    """Name, layers, a page, blocks of the pool, blocks that are copied."""
    matmul: int
    copy_bytes: int = 1 << 30


MHA = partial(AttentionCase, heads=40, kv_heads=40)
GQA4 = partial(AttentionCase, heads=32, kv_heads=8)
GQA8 = partial(AttentionCase, heads=64, kv_heads=8)

SHORT = Sizes(
    decode=[MHA(16, 2048), GQA4(64, 2048)],
    prefill=[MHA(1, 4096, 4096)],
    more=[MHA(1, 8192), GQA4(64, 2048, kv_dtype="int8")],
    block_copies=[("llama-2-13b", 40, (16, 40, 128), 192, 64)],
    matmul=8192,
)
FULL = Sizes(
    decode=[
        MHA(16, 2048),
        MHA(64, 2048),
        GQA4(16, 8192),
        GQA4(64, 2048),
        GQA4(256, 2048),
        GQA8(64, 4096),
        GQA8(16, 65536),
    ],
    prefill=[
        MHA(1, 4096, 4096),
        GQA4(1, 4096, 4096),
        GQA8(1, 8192, 4096),
    ],
    more=[
        *(MHA(1, context) for context in (128, 2048, 16384, 65536)),
        *(GQA4(batch, 512) for batch in (4, 16, 64, 256)),
        *(GQA4(64, 2048, block_size=size) for size in (32, 64, 256)),
        *(GQA4(64, 2048, kv_dtype=codes) for codes in ("int8", "float8_e4m3fn")),
        AttentionCase(64, 2048, heads=9, kv_heads=3, head_dim=64),
        AttentionCase(64, 2048, heads=32, kv_heads=32, head_dim=80),
        AttentionCase(16, 2048, heads=16, kv_heads=16, head_dim=256),
        GQA4(8, 512, 512),
        GQA4(8, 4096, 512),
        AttentionCase(1, 4096, 4096, heads=9, kv_heads=3, head_dim=64),
    ],
    block_copies=[
        ("llama-2-13b", 40, (16, 40, 128), 192, 64),
        ("llama-2-70b", 80, (16, 8, 128), 512, 64),
    ],
    matmul=8192,
)
TOY = Sizes(
    decode=[AttentionCase(16, 2048, heads=2, kv_heads=1, head_dim=16, dtype="float32")],
    prefill=[AttentionCase(1, 64, 64, heads=2, kv_heads=2, head_dim=16, dtype="float32")],
    more=[AttentionCase(3, 70, heads=3, kv_heads=1, head_dim=16, dtype="float32")],
    block_copies=[("toy", 2, (8, 2, 16), 32, 4)],
    matmul=256,
    copy_bytes=1 << 22,
)


@dataclass(frozen=True)
class Measured:
    """One implementation on one case."""

    case: AttentionCase
    name: str
    seconds: float
    error: float
    """Of the result against the XLA backend's, relative to its norm."""


@dataclass
class Sweep:
    """Runs until the deadline; collects what was measured, and what could not be and why."""

    backend: Backend
    seed: int
    deadline_s: float
    """On the clock of time.perf_counter."""
    measured: list[Measured] = field(default_factory=list)
    copies: list[tuple[str, str, float]] = field(default_factory=list)
    """Of block copies: case, direction, bytes a second, read and written."""
    _missing: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    @property
    def missing(self) -> dict[str, str]:
        """What could not be measured, each with its reasons and cases."""
        found: dict[str, str] = {}
        for (what, reason), cases in self._missing.items():
            reason += f" ({'; '.join(cases)})"
            found[what] = f"{found[what]}. {reason}" if what in found else reason
        return found

    def run(self, sizes: Sizes, progress: Progress) -> None:
        claims = [*sizes.decode, *sizes.prefill]
        with progress.track("kernels", len(claims) + len(sizes.more) + len(sizes.block_copies)) as task:
            for copy in sizes.block_copies:
                self._tried("block copy", copy[0], partial(self._block_copy, *copy))
                task.advance()
            for case in claims:
                self._case(case, with_peers=True)
                task.advance()
            for case in sizes.more:
                self._case(case, with_peers=False)
                task.advance()

    def _case(self, case: AttentionCase, *, with_peers: bool) -> None:
        if self._late("case", case):
            return
        copies = min(MAX_COPIES, -(-FLUSH_BYTES // case.kv_bytes())) if jax.default_backend() != "cpu" else 1
        inputs: list[AttentionInputs] = []
        self._tried("case", case, lambda: inputs.extend(random_inputs(case, self.seed + i) for i in range(copies)))
        if not inputs:
            return
        reference = Jserve("xla")
        wanted = np.asarray(jax.jit(partial(reference.attend, case))(inputs[0], inputs[0].q), np.float32)
        ours: list[Peer] = [Jserve(self.backend)]
        for peer in ours + (jax_peers() if with_peers else []):
            if peer.name in (m.name for m in self.measured if m.case == case):
                continue  # the XLA backend, where it is ours too
            if not self._late(peer.name, case):
                self._tried(peer.name, case, partial(self._measure, peer, case, inputs, wanted))
        for other in torch_peers.torch_peers() if with_peers else []:
            if not self._late(other.name, case):
                self._tried(other.name, case, partial(self._measure_torch, other, case, inputs[0], wanted))
        inputs.clear()
        gc.collect()

    def _tried(self, what: str, case: object, job: Callable[[], Any]) -> None:
        try:
            job()
        except Unavailable as error:
            self._miss(what, case, str(error))
        except Exception as error:  # one kernel that fails must not take the others' numbers with it
            text = str(error).strip()
            self._miss(what, case, f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}")

    def _late(self, what: str, case: object) -> bool:
        late = time.perf_counter() > self.deadline_s
        if late:
            self._miss(what, case, "the time budget was spent")
        return late

    def _miss(self, what: str, case: object, reason: str) -> None:
        self._missing.setdefault((what, reason), []).append(str(case))

    def _measure(self, peer: Peer, case: AttentionCase, inputs: list[AttentionInputs], wanted: np.ndarray) -> None:
        if jax.default_backend() == "cpu" and not isinstance(peer, Jserve):
            raise Unavailable("it needs an NVIDIA GPU")
        repeats = max(1, MIN_CALLS // len(inputs))
        prepared = [peer.prepare(case, x) for x in inputs]
        run = jax.jit(chained(peer, case, repeats))
        first, _ = run(prepared, inputs[0].q)
        error = relative_error(np.asarray(first, np.float32), wanted)
        seconds = device_seconds(lambda: run(prepared, inputs[0].q)) / (repeats * len(inputs))
        self._keep(case, peer.name, seconds, error)

    def _measure_torch(self, peer: Any, case: AttentionCase, x: AttentionInputs, wanted: np.ndarray) -> None:
        if jax.default_backend() == "cpu":
            raise Unavailable("it needs an NVIDIA GPU")
        seconds, result = torch_peers.measure(peer.prepare(case, x))
        self._keep(case, peer.name, seconds, relative_error(result.reshape(wanted.shape), wanted))

    def _keep(self, case: AttentionCase, name: str, seconds: float, error: float) -> None:
        if not error <= MAX_ERROR:  # NaN too
            raise Unavailable(f"its result is not the XLA backend's: {error:.3g} of its norm away")
        self.measured.append(Measured(case, name, seconds, error))

    def _block_copy(self, name: str, layers: int, page: tuple[int, ...], blocks: int, count: int) -> None:
        dtype = jnp.bfloat16
        shape = (blocks, *page)
        pools = [[jnp.full(shape, layer + part / 2, dtype) for layer in range(layers)] for part in range(2)]
        ids = jnp.asarray(np.random.default_rng(self.seed).permutation(blocks)[:count], jnp.int32)
        gather = jax.jit(partial(gather_blocks, backend=self.backend))
        scatter = jax.jit(partial(scatter_blocks, backend=self.backend), donate_argnums=(0, 1))
        buffer = gather(*pools, ids)

        def back() -> Any:
            pools[:] = scatter(*pools, ids, buffer)
            return pools

        for way, launch in (("gather", lambda: gather(*pools, ids)), ("scatter", back)):
            self.copies.append((name, way, 2 * buffer.nbytes / device_seconds(launch)))


def relative_error(result: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(result - wanted) / np.linalg.norm(wanted))
