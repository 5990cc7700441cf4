"""The compiled programs of a runner, and nothing else that compiles.

A step is two calls: `forward` (backbone, compiled for each token bucket) and `head` (logits and sampler, compiled for
each row bucket), so that the number of programs is the sum of the buckets. Between them travels one fixed array of
hidden states, one row a slot. `warm_up` compiles all of them before the first request; `CompileCounter` tells whether
anything compiles after that.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float32, Int32

from jserve.batch import (
    COPY_BUCKETS,
    DIRECT_COPY_BLOCKS,
    Limits,
    forward_sizes,
    head_sizes,
    unpack_forward,
    unpack_head,
)
from jserve.models.layers import use_matmul
from jserve.models.spec import ModelSpec
from jserve.pallas_kernels.backends import Backend
from jserve.pallas_kernels.block_copy import copy_blocks_in, copy_blocks_out, gather_blocks, scatter_blocks
from jserve.pallas_kernels.kv_write import kv_write
from jserve.pallas_kernels.matmul import matmul
from jserve.pallas_kernels.metadata import BatchMetadata
from jserve.pallas_kernels.paged_attention import paged_attention
from jserve.progress import Progress
from jserve.request import SamplingParams
from jserve.sampling import Sampled, SamplingState, empty_state, pack_slot, sample, set_counts, set_slot

Leaves = list[Array]
Pool = list[Array]
"""K or V of the whole cache: one [blocks, block_size, kv_heads, head_dim] a layer."""

POOL_SPEC = P(None, None, "tp", None)
BLOCK_SPEC = P(None, None, None, "tp", None)
HEADS_SPEC = P(None, "tp", None)


@dataclass(frozen=True)
class ProgramReport:
    """What warm-up tells of one program."""

    name: str
    compile_s: float
    temp_bytes: int


class CompileCounter:
    """Counts XLA compilations in this process since the last `reset`."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1

    def reset(self) -> None:
        self.count = 0

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)


class Programs:
    """The jitted functions for one model on one mesh. Holds no device memory but the shapes of it."""

    def __init__(self, model: nnx.Module, spec: ModelSpec, mesh: Mesh, limits: Limits, backend: Backend) -> None:
        self.spec, self.mesh, self.limits, self.backend = spec, mesh, limits, backend
        self._graph, state = nnx.split(model)
        leaves, self._treedef = jax.tree.flatten(state)
        self._leaf_shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
        self.dtype = leaves[0].dtype
        self.replicated = NamedSharding(mesh, P())
        self.pool_sharding = NamedSharding(mesh, POOL_SPEC)
        pools = [self.pool_sharding] * spec.num_layers
        same = self.replicated
        self.set_slot = jax.jit(set_slot, donate_argnums=0, out_shardings=same)
        self.set_counts = jax.jit(set_counts, donate_argnums=0, out_shardings=same)
        self._forward = jax.jit(
            self._forward_step, static_argnums=0, donate_argnums=(2, 3), out_shardings=(same, pools, pools)
        )
        self._gather = jax.jit(self._gather_blocks, static_argnums=0)
        self._scatter = jax.jit(self._scatter_blocks, donate_argnums=(0, 1), out_shardings=(pools, pools))
        self._copy_out = jax.jit(copy_blocks_out, out_shardings=same)
        self._copy_in = jax.jit(copy_blocks_in, donate_argnums=(0, 1), out_shardings=(same, pools, pools))
        self._compiled: dict[tuple[str, int], Callable[..., Any]] = {}
        self._head = jax.jit(self._head_step, static_argnums=0, donate_argnums=3, out_shardings=(same, same))

    # --- the two halves of a step -------------------------------------------------------------------------------

    def forward(
        self, tokens: int, leaves: Leaves, k: Pool, v: Pool, last_token: Int32[Array, "S"], words: Int32[Array, "words"]
    ) -> tuple[Float[Array, "S hidden"], Pool, Pool]:
        """Run the backbone over a batch of bucket `tokens`: hidden states of the sampling rows, and the pools."""
        program = self._compiled.get(("forward", tokens)) or partial(self._forward, tokens)
        result: tuple[Array, Pool, Pool] = program(leaves, k, v, last_token, words)
        return result

    def head(
        self,
        rows: int,
        leaves: Leaves,
        hidden: Float[Array, "S hidden"],
        state: SamplingState,
        words: Int32[Array, "words"],
    ) -> tuple[Sampled, SamplingState]:
        """Logits and next tokens of the first `rows` hidden states."""
        program = self._compiled.get(("head", rows)) or partial(self._head, rows)
        result: tuple[Sampled, SamplingState] = program(leaves, hidden, state, words)
        return result

    def _forward_step(
        self, tokens: int, leaves: Leaves, k: Pool, v: Pool, last_token: Array, words: Array
    ) -> tuple[Array, Pool, Pool]:
        batch = unpack_forward(words, tokens, self.limits)
        k, v = list(k), list(v)

        def attend(layer: int, q: Array, new_k: Array, new_v: Array) -> Array:
            out, k[layer], v[layer] = self._attention(q, new_k, new_v, k[layer], v[layer], batch.attention)
            return out

        ids = jnp.where(batch.tokens < 0, last_token[-1 - batch.tokens], batch.tokens)
        hidden = self._model(leaves, batch.live)(ids, batch.positions, attend)
        return hidden[batch.sampled], k, v

    def _head_step(
        self, rows: int, leaves: Leaves, hidden: Array, state: SamplingState, words: Array
    ) -> tuple[Sampled, SamplingState]:
        head = unpack_head(words, rows)
        logits = self._model(leaves, head.live).logits(hidden[:rows])
        return sample(logits, state, head.slots, head.output_index, head.flags)

    def _model(self, leaves: Leaves, live: Int32[Array, ""]) -> Any:
        """The model for a batch whose rows from `live` on are padding."""
        model = nnx.merge(self._graph, jax.tree.unflatten(self._treedef, leaves))
        # A native product is opaque to XLA, which could not split it over several devices.
        backend: Backend = self.backend if self.mesh.size == 1 else "xla"
        use_matmul(model, partial(matmul, live=live, backend=backend))
        return model

    def _attention(
        self, q: Array, new_k: Array, new_v: Array, k: Array, v: Array, meta: BatchMetadata
    ) -> tuple[Array, Array, Array]:
        """Write the batch's KV, then attend; each device of the mesh does its own heads."""
        scale = self.spec.head_dim**-0.5

        def local(
            q: Array, new_k: Array, new_v: Array, k: Array, v: Array, meta: BatchMetadata
        ) -> tuple[Array, Array, Array]:
            k, v = kv_write(k, v, new_k, new_v, meta.kv_slot, backend=self.backend)
            return paged_attention(q, k, v, meta, scale=scale, backend=self.backend), k, v

        sharded: Callable[..., tuple[Array, Array, Array]] = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(HEADS_SPEC, HEADS_SPEC, HEADS_SPEC, POOL_SPEC, POOL_SPEC, P()),
            out_specs=(HEADS_SPEC, POOL_SPEC, POOL_SPEC),
            check_vma=False,
        )
        return sharded(q, new_k, new_v, k, v, meta)

    # --- copies of blocks, for the tiers ------------------------------------------------------------------------

    def gather(self, count: int, k: Pool, v: Pool, ids: Int32[Array, "count"]) -> list[Array]:
        """Blocks of the pool, each in one array of `block_shape`."""
        program = self._compiled.get(("gather", count)) or partial(self._gather, count)
        result: list[Array] = program(k, v, ids)
        return result

    def scatter(
        self, count: int, k: Pool, v: Pool, ids: Int32[Array, "count"], blocks: list[Array]
    ) -> tuple[Pool, Pool]:
        """The pool with `blocks` in the places `ids`; ids outside of it are dropped."""
        program = self._compiled.get(("scatter", count)) or self._scatter
        result: tuple[Pool, Pool] = program(k, v, ids, blocks)
        return result

    @property
    def copies_directly(self) -> bool:
        """Whether blocks go straight between the pool and host memory: where the device is the CPU, and one."""
        return self.backend == "native" and self.mesh.size == 1

    def copy_out(self, k: Pool, v: Pool, places: Int32[np.ndarray, "n 3"]) -> Float32[Array, ""]:
        """`block_copy.copy_blocks_out`."""
        program = self._compiled.get(("copy out", DIRECT_COPY_BLOCKS)) or self._copy_out
        seconds: Array = program(k, v, places)
        return seconds

    def copy_in(self, k: Pool, v: Pool, places: Int32[np.ndarray, "n 3"]) -> tuple[Float32[Array, ""], Pool, Pool]:
        """`block_copy.copy_blocks_in`."""
        program = self._compiled.get(("copy in", DIRECT_COPY_BLOCKS)) or self._copy_in
        result: tuple[Array, Pool, Pool] = program(k, v, places)
        return result

    def _gather_blocks(self, count: int, k: Pool, v: Pool, ids: Array) -> list[Array]:
        def local(k: Pool, v: Pool, ids: Array) -> list[Array]:
            return list(gather_blocks(k, v, ids, backend=self.backend))

        pools = [POOL_SPEC] * self.spec.num_layers
        sharded: Callable[..., list[Array]] = jax.shard_map(
            local, mesh=self.mesh, in_specs=(pools, pools, P()), out_specs=[BLOCK_SPEC] * count, check_vma=False
        )
        return sharded(k, v, ids)

    def _scatter_blocks(self, k: Pool, v: Pool, ids: Array, blocks: list[Array]) -> tuple[Pool, Pool]:
        def local(k: Pool, v: Pool, ids: Array, blocks: list[Array]) -> tuple[Pool, Pool]:
            return scatter_blocks(k, v, ids, jnp.stack(blocks), backend=self.backend)

        pools = [POOL_SPEC] * self.spec.num_layers
        sharded: Callable[..., tuple[Pool, Pool]] = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(pools, pools, P(), [BLOCK_SPEC] * len(blocks)),
            out_specs=(pools, pools),
            check_vma=False,
        )
        return sharded(k, v, ids, blocks)

    # --- memory -------------------------------------------------------------------------------------------------

    def pool_shape(self) -> tuple[int, int, int, int]:
        return self.limits.num_blocks, self.limits.block_size, self.spec.num_kv_heads, self.spec.head_dim

    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Of a block outside the pool: [layers, K and V, block_size, kv_heads, head_dim]."""
        return self.spec.num_layers, 2, *self.pool_shape()[1:]

    def empty_pool(self) -> Pool:
        """The zeroed K or V cache, straight on the mesh."""
        zeros = jax.jit(lambda: jnp.zeros(self.pool_shape(), self.dtype), out_shardings=self.pool_sharding)
        return [zeros() for _ in range(self.spec.num_layers)]

    def empty_state(self) -> SamplingState:
        make = jax.jit(empty_state, static_argnums=(0, 1), out_shardings=self.replicated)
        state: SamplingState = make(self.limits.slots, self.spec.vocab_size)
        return state

    def state_bytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in self._state_shapes())

    # --- compiling ----------------------------------------------------------------------------------------------

    def lower_forward(self, tokens: int) -> Any:
        pool = self._pool_shapes()
        last_token = self._vector(self.limits.slots)
        words = self._vector(sum(forward_sizes(tokens, self.limits)))
        return self._forward.lower(tokens, self._leaf_shapes, pool, pool, last_token, words)

    def lower_head(self, rows: int) -> Any:
        hidden = jax.ShapeDtypeStruct((self.limits.slots, self.spec.hidden_size), self.dtype, sharding=self.replicated)
        return self._head.lower(
            rows, self._leaf_shapes, hidden, self._state_shapes(), self._vector(sum(head_sizes(rows)))
        )

    def lower_gather(self, count: int) -> Any:
        return self._gather.lower(count, self._pool_shapes(), self._pool_shapes(), self._vector(count))

    def lower_scatter(self, count: int) -> Any:
        sharding = NamedSharding(self.mesh, BLOCK_SPEC)
        blocks = [jax.ShapeDtypeStruct(self.block_shape(), self.dtype, sharding=sharding)] * count
        return self._scatter.lower(self._pool_shapes(), self._pool_shapes(), self._vector(count), blocks)

    def warm_up(
        self,
        token_buckets: tuple[int, ...],
        row_buckets: tuple[int, ...],
        copies: bool,
        progress: Progress,
    ) -> list[ProgramReport]:
        """Compile everything; later calls with these buckets find the programs ready. `copies`: those for the tiers."""
        slot_words = self._vector(len(pack_slot(0, SamplingParams(), frozenset(), self.spec.vocab_size)))
        counts = self._vector(self.spec.vocab_size)
        jobs: list[tuple[tuple[str, int], Callable[[], Any]]] = [
            (("set_slot", 0), lambda: self.set_slot.lower(self._state_shapes(), slot_words)),
            (("set_counts", 0), lambda: self.set_counts.lower(self._state_shapes(), np.int32(0), counts)),
        ]
        jobs += self._copy_jobs() if copies else []
        jobs += [(("head", n), partial(self.lower_head, n)) for n in row_buckets]
        jobs += [(("forward", n), partial(self.lower_forward, n)) for n in token_buckets]
        # Tracing holds the interpreter, so it stays serial; XLA compiles outside of it, in threads.
        with ThreadPoolExecutor(max_workers=2) as threads, progress.track("compiling", len(jobs)) as task:
            pending = [(name, threads.submit(_compile, lower())) for name, lower in jobs]
            reports = []
            for (name, size), job in pending:
                self._compiled[name, size], seconds, temp_bytes = job.result()
                reports.append(ProgramReport(f"{name}[{size}]" if size else name, seconds, temp_bytes))
                task.advance()
        traced: tuple[Any, ...] = (
            self._forward,
            self._head,
            self._gather,
            self._scatter,
            self._copy_out,
            self._copy_in,
        )  # what they have traced is compiled now
        for function in traced:
            function.clear_cache()
        _give_memory_back()
        return reports

    def _copy_jobs(self) -> list[tuple[tuple[str, int], Callable[[], Any]]]:
        if not self.copies_directly:
            jobs = [(("gather", n), partial(self.lower_gather, n)) for n in COPY_BUCKETS]
            return jobs + [(("scatter", n), partial(self.lower_scatter, n)) for n in COPY_BUCKETS]
        pool, n = self._pool_shapes(), DIRECT_COPY_BLOCKS
        places = jax.ShapeDtypeStruct((n, 3), jnp.int32, sharding=self.replicated)
        return [
            (("copy out", n), lambda: self._copy_out.lower(pool, pool, places)),
            (("copy in", n), lambda: self._copy_in.lower(pool, pool, places)),
        ]

    def _pool_shapes(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(self.pool_shape(), self.dtype, sharding=self.pool_sharding)] * self.spec.num_layers

    def _vector(self, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size,), jnp.int32, sharding=self.replicated)

    def _state_shapes(self) -> SamplingState:
        shapes = jax.eval_shape(lambda: empty_state(self.limits.slots, self.spec.vocab_size))
        shaped: SamplingState = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), shapes
        )
        return shaped


def _compile(lowered: Any) -> tuple[Callable[..., Any], float, int]:
    """The program, the seconds it took, and the bytes of its temporaries."""
    start = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return compiled, time.perf_counter() - start, int(memory.temp_size_in_bytes) if memory else 0


def _give_memory_back() -> None:
    """What tracing and compiling have freed goes back to the system, where the C library can do that (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
