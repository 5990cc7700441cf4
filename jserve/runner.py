"""The Executor door on XLA: owns the device (weights, KV pool, sampler state) and turns step plans into program calls.

Everything here runs on the engine's thread. `launch` packs a plan into two small vectors, sends them, and calls the
compiled programs, which return at once; `LaunchedStep.read` waits for the tokens. The newest token of a slot stays
on the device, so that the next step can be launched before anybody has read it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from jserve.batch import (
    COPY_BUCKETS,
    DIRECT_COPY_BLOCKS,
    ROW_BUCKETS,
    TOKEN_BUCKETS,
    Limits,
    bucket_for,
    buckets_up_to,
    pack_forward,
    pack_head,
)
from jserve.cache.transfer import LOADS_BESIDE_POOL, STORES_BESIDE_POOL
from jserve.config import EngineConfig, cache_root
from jserve.doors import EngineInfo, StepResult
from jserve.errors import ConfigError
from jserve.host_memory import available_host_bytes
from jserve.models.spec import ModelSpec
from jserve.pallas_kernels.backends import check_supported, choose_backend
from jserve.profiler import StepWindow
from jserve.programs import BLOCK_SPEC, CompileCounter, ProgramReport, Programs
from jserve.progress import Progress, SilentProgress
from jserve.request import TokenLogprobs
from jserve.sampling import Sampled, count_tokens, flags_of, needs_counts, pack_slot
from jserve.sched.plan import Row, StepPlan
from jserve.sched.sequence import Sequence

T = TypeVar("T")

_SLOW = {("cpu", "xla"): " (about ten times slower than native, which needs a C++ compiler: install one, such as g++)"}

CPU_POOL_BYTES = 2 << 30
"""On CPU, the pool's size when the user names none: memory is shared there, so its free part is no measure."""


@dataclass(slots=True)
class XlaStep:
    """A launched step and the tokens that it will have."""

    sampled: Sampled | None
    wanted_logprobs: list[int | None]
    """Of each sampling row, how many alternatives it asked for."""
    pack_s: float

    def read(self) -> StepResult:
        if self.sampled is None:
            return StepResult([])
        tokens = np.asarray(self.sampled.tokens)[: len(self.wanted_logprobs)].tolist()
        if all(n is None for n in self.wanted_logprobs):
            return StepResult(tokens)
        logprob, ids, top = (np.asarray(a) for a in self.sampled[1:])
        return StepResult(
            tokens,
            [
                None if n is None else TokenLogprobs(float(logprob[i]), ids[i, :n].tolist(), top[i, :n].tolist())
                for i, n in enumerate(self.wanted_logprobs)
            ],
        )


class Runner:
    """See the module. Built by `from_config`, or from a model already on its mesh."""

    def __init__(
        self, config: EngineConfig, model: nnx.Module, spec: ModelSpec, name: str, mesh: Mesh, progress: Progress
    ) -> None:
        self.config, self.spec, self.mesh = config, spec, mesh
        platform = mesh.devices.flat[0].platform
        self._leaves = jax.tree.leaves(nnx.split(model)[1])
        self.weight_bytes = sum(x.nbytes for x in self._leaves)
        self._backend = choose_backend(config.runner.attention_backend, platform)
        self._block_size, token_budget = config.block_and_budget(platform)
        check_supported(self._backend, head_dim=spec.head_dim, dtype=self._leaves[0].dtype, block_size=self._block_size)
        progress.note(f"attention backend: {self._backend}" + _SLOW.get((platform, self._backend), ""))
        self._token_buckets = _token_buckets(config.runner.token_buckets, token_budget)
        self._row_buckets = buckets_up_to(config.sched.max_running, ROW_BUCKETS)
        self._compiles = CompileCounter()

        max_model_len = config.max_model_len or spec.max_position
        if max_model_len > spec.max_position:
            raise ConfigError(
                f"max_model_len is {max_model_len}, above the model's {spec.max_position}: lower it, or leave it out"
            )
        self._model = model
        self.limits = self._size(max_model_len, platform)
        self.programs = Programs(model, spec, mesh, self.limits, self._backend)
        self._take_memory(platform)
        slots, blocks = self.limits.slots, self.limits.blocks_per_sequence
        self._tables = np.zeros((slots, blocks), np.int32)
        self._table_len = [0] * slots
        self._slot_flags = np.zeros((slots, 3), np.bool_)
        self.info = EngineInfo(
            model=name,
            fingerprint=_fingerprint(name, spec, str(self.programs.dtype), self._weights_digest()),
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            block_size=self.limits.block_size,
            device_blocks=self.limits.num_blocks,
            token_budget=token_budget,
            dtype=str(self.programs.dtype),
            backend=f"{platform}/{self._backend}",
            weight_bytes=self.weight_bytes,
            pool_bytes=sum(x.nbytes for x in self._k + self._v),
        )
        self.reports: list[ProgramReport] = []
        if config.runner.warmup:
            copies = config.cache.host_gib > 0
            self.reports = self.programs.warm_up(self._token_buckets, self._row_buckets, copies, progress)
            progress.note(table_of(self.reports))
            self._rehearse()
        said = config.runner
        self.profile: StepWindow | None = None
        """Traces some of the steps to come."""
        if said.profile_dir is not None:
            self.profile = StepWindow(said.profile_dir, said.profile_skip, said.profile_steps, progress.note)
        self._compiles.reset()

    @classmethod
    def from_config(cls, config: EngineConfig, progress: Progress | None = None) -> Runner:
        """Find and load the model, then as above. Raises ConfigError or ModelError."""
        from jserve import checkpoints
        from jserve.pull import resolve_model

        progress = progress or SilentProgress()
        path = resolve_model(config.model, progress)
        set_up_compile_cache(config.runner.compile_cache_dir or cache_root() / "xla")
        mesh = make_mesh(config.tp)
        config.block_and_budget(mesh.devices.flat[0].platform)  # told before the weights are loaded
        dtype = resolve_dtype(config.dtype, mesh)
        if dtype == jnp.float32 and mesh.devices.flat[0].platform != "cpu":
            # On GPUs float32 products are TF32 by default, which would break "same tokens however computed".
            jax.config.update("jax_default_matmul_precision", "highest")
        loaded = checkpoints.load(path, mesh=mesh, dtype=dtype, progress=progress)
        return cls(config, loaded.model, loaded.spec, loaded.name, mesh, progress)

    def _weights_digest(self) -> str:
        """Of the weights themselves, where KV outlives the process; elsewhere its own weights are all there are."""
        if self.config.cache.disk_dir is None:
            return ""
        return hashlib.blake2b(b"".join(np.asarray(_checksum(x)).tobytes() for x in self._leaves)).hexdigest()

    # --- sizes --------------------------------------------------------------------------------------------------

    def _size(self, max_model_len: int, platform: str) -> Limits:
        """The pool's size: as told, or what is free once the largest program has its temporaries."""
        block_size = self._block_size
        blocks = self.config.cache.device_blocks
        slots = self.config.sched.max_running
        per_sequence = -(-max_model_len // block_size)
        if blocks is None:
            itemsize = self._leaves[0].dtype.itemsize
            block_bytes = 2 * self.spec.num_layers * block_size * self.spec.num_kv_heads * self.spec.head_dim * itemsize
            block_bytes //= self.config.tp
            blocks = self._free_bytes(platform, Limits(slots, per_sequence, block_size, slots)) // block_bytes
            if self.config.cache.host_gib and platform != "cpu":
                blocks -= STORES_BESIDE_POOL + LOADS_BESIDE_POOL
            blocks = min(blocks, slots * per_sequence)
            if blocks < 1:
                raise ConfigError(
                    f"no memory is left for the KV pool (one block takes {block_bytes / 2**20:.1f} MiB): "
                    "use a smaller model or dtype, a larger --tp, or a lower --token-budget"
                )
        return Limits(slots, per_sequence, block_size, blocks)

    def _free_bytes(self, platform: str, trial: Limits) -> int:
        """What the pool may take: programs must be compiled for its size, so a trial tells their temporaries first."""
        if platform == "cpu":
            return min(CPU_POOL_BYTES, int(self.config.cache.memory_fraction * available_host_bytes() / 2))
        programs = Programs(self._model, self.spec, self.mesh, trial, self._backend)
        largest = programs.lower_forward(self._token_buckets[-1]), programs.lower_head(self._row_buckets[-1])
        temporaries = max(int(lowered.compile().memory_analysis().temp_size_in_bytes) for lowered in largest)
        stats = self.mesh.devices.flat[0].memory_stats()
        free = int(stats["bytes_limit"]) - int(stats["bytes_in_use"]) - temporaries - programs.state_bytes()
        return int(self.config.cache.memory_fraction * free)

    def _take_memory(self, platform: str) -> None:
        layer_bytes = 2 * math.prod(self.programs.pool_shape()) * self.programs.dtype.itemsize
        pool_bytes = self.spec.num_layers * layer_bytes
        too_much = ConfigError(
            f"the KV pool of {self.limits.num_blocks} blocks takes {pool_bytes / 2**30:.1f} GiB, too much here: "
            "lower --device-blocks, or leave it out to size the pool from free memory"
        )
        if platform == "cpu" and pool_bytes > available_host_bytes():
            raise too_much  # the system would grant it, and kill us once it is used
        try:
            self._k, self._v = self.programs.empty_pool(), self.programs.empty_pool()
            self._state = self.programs.empty_state()
            jax.block_until_ready((self._k, self._v, self._state))
        except jax.errors.JaxRuntimeError as error:
            raise too_much from error

    def _rehearse(self) -> None:
        """Run every program once on a batch of padding, which writes nothing: first calls are slow."""
        for tokens in self._token_buckets:
            hidden = self._forward(pack_forward(StepPlan(), self._tables, tokens, self.limits), tokens)
        for rows in self._row_buckets:
            self._head(hidden, pack_head([], self._slot_flags, rows, self.limits), rows)
        jax.block_until_ready((self._k, self._state))

    # --- the Executor door --------------------------------------------------------------------------------------

    @property
    def compiles_after_warmup(self) -> int:
        return self._compiles.count

    @property
    def shares_cores(self) -> bool:
        """Whether the device is the processor that runs Python too, and its memory the host's."""
        return bool(self.mesh.devices.flat[0].platform == "cpu")

    def phase(self, name: str) -> AbstractContextManager[object]:
        return jax.profiler.TraceAnnotation(name)

    def launch(self, plan: StepPlan) -> XlaStep:
        if self.profile is not None:
            self.profile.launch()
        start = time.perf_counter()
        for sequence in plan.admitted:
            self._admit(sequence)
        self._update_tables(plan)
        tokens = bucket_for(plan.num_tokens, self._token_buckets)
        forward_words = pack_forward(plan, self._tables, tokens, self.limits)
        sampling = [row for row in plan.rows if row.samples]
        pack_s = time.perf_counter() - start

        with self.phase("forward"):
            hidden = self._forward(forward_words, tokens)
        return self._launch_head(hidden, sampling, pack_s)

    def _forward(self, words: np.ndarray, tokens: int) -> jax.Array:
        hidden, self._k, self._v = self.programs.forward(
            tokens, self._leaves, self._k, self._v, self._state.last_token, self._send(words)
        )
        return hidden

    def _head(self, hidden: jax.Array, words: np.ndarray, rows: int) -> Sampled:
        sampled, self._state = self.programs.head(rows, self._leaves, hidden, self._state, self._send(words))
        return sampled

    def _launch_head(self, hidden: jax.Array, sampling: list[Row], pack_s: float) -> XlaStep:
        if not sampling:
            return XlaStep(None, [], pack_s)
        start = time.perf_counter()
        rows = bucket_for(len(sampling), self._row_buckets)
        words = pack_head(sampling, self._slot_flags, rows, self.limits)
        wanted = [row.sequence.sampling.logprobs for row in sampling]
        pack_s += time.perf_counter() - start
        with self.phase("sample"):
            sampled = self._head(hidden, words, rows)
        for array in sampled if any(n is not None for n in wanted) else sampled[:1]:
            array.copy_to_host_async()
        return XlaStep(sampled, wanted, pack_s)

    def _admit(self, sequence: Sequence) -> None:
        """Give the slot its new request's sampling state."""
        slot, params = sequence.slot, sequence.sampling
        self._table_len[slot] = 0
        self._slot_flags[slot] = flags_of(params)
        words = pack_slot(slot, params, sequence.stop_token_ids, self.spec.vocab_size)
        self._state = self.programs.set_slot(self._state, self._send(words))
        if needs_counts(params):
            prompt, output = sequence.tokens[: sequence.num_prompt], sequence.tokens[sequence.num_prompt :]
            counts = count_tokens(prompt, output, self.spec.vocab_size)
            self._state = self.programs.set_counts(self._state, np.int32(slot), self._send(counts))

    def _update_tables(self, plan: StepPlan) -> None:
        """Note the blocks that the plan's sequences have got since their last step."""
        for row in plan.rows:
            slot, blocks = row.sequence.slot, row.sequence.table.blocks
            have = self._table_len[slot]
            if have < len(blocks):
                self._tables[slot, have : len(blocks)] = blocks[have:]
                self._table_len[slot] = len(blocks)

    # --- blocks outside the pool, for the Transfer door ---------------------------------------------------------

    @property
    def block_sharding(self) -> NamedSharding:
        """Of a block on the device, outside the pool."""
        return NamedSharding(self.mesh, BLOCK_SPEC)

    @property
    def host_sharding(self) -> NamedSharding:
        """Of a block in pinned host memory."""
        return NamedSharding(self.mesh, BLOCK_SPEC, memory_kind="pinned_host")

    @property
    def block_bytes(self) -> int:
        return math.prod(self.programs.block_shape()) * int(self.programs.dtype.itemsize)

    @property
    def copies_directly(self) -> bool:
        """Whether `copy_out` and `copy_in` work here; `gather` and `scatter` do everywhere."""
        return self.programs.copies_directly

    def copy_out(self, blocks: Seq[int], addresses: Seq[int]) -> jax.Array:
        """Copy at most DIRECT_COPY_BLOCKS blocks, as the steps launched so far leave them, to host memory. When the
        result is there (seconds), so are they: until then the memory must stay."""
        return self.programs.copy_out(self._k, self._v, self._places(blocks, addresses))

    def copy_in(self, blocks: Seq[int], addresses: Seq[int]) -> jax.Array:
        """The way back, before any step that is launched later."""
        seconds, self._k, self._v = self.programs.copy_in(self._k, self._v, self._places(blocks, addresses))
        return seconds

    def _places(self, blocks: Seq[int], addresses: Seq[int]) -> np.ndarray:
        rows = np.full((DIRECT_COPY_BLOCKS, 3), self.limits.num_blocks, np.int32)
        rows[: len(blocks), 0] = blocks
        rows[: len(blocks), 1:] = np.array(addresses, "<u8").view("<i4").reshape(-1, 2)
        return rows  # sent by the call itself, which is twice as fast

    def gather(self, blocks: list[int]) -> list[jax.Array]:
        """Copies of these blocks of the pool, as the steps that are launched so far leave them."""
        copies: list[jax.Array] = []
        for part in _batches(blocks):
            ids = self._send(_padded(part, self.limits.num_blocks))
            copies += self.programs.gather(len(ids), self._k, self._v, ids)[: len(part)]
        return copies

    def scatter(self, blocks: list[int], contents: list[jax.Array]) -> None:
        """Put contents into these blocks of the pool, before any step that is launched later."""
        for part in _batches(list(zip(blocks, contents, strict=True))):
            ids = self._send(_padded([block for block, _ in part], self.limits.num_blocks))
            arrays = [array for _, array in part] + [part[0][1]] * (len(ids) - len(part))
            self._k, self._v = self.programs.scatter(len(ids), self._k, self._v, ids, arrays)

    def _send(self, words: np.ndarray) -> jax.Array:
        sent: jax.Array = jax.device_put(words, self.programs.replicated)
        return sent

    def wait(self) -> None:
        """Until all that was launched has ended."""
        jax.block_until_ready((self._k, self._v, self._state))

    def close(self) -> None:
        """Free the device memory."""
        if self.profile is not None:
            self.profile.close()
        self._compiles.close()
        for array in (*self._k, *self._v, *self._leaves, *self._state):
            array.delete()


def table_of(reports: list[ProgramReport]) -> str:
    """The programs with their compile times and temporary memory, for the start-up print."""
    lines = [f"{'program':<16}{'compiled in':>12}{'temporaries':>14}"]
    lines += [f"{r.name:<16}{r.compile_s:>10.2f} s{r.temp_bytes / 2**20:>10.1f} MiB" for r in reports]
    total_s = sum(r.compile_s for r in reports)
    return "\n".join([*lines, f"{len(reports)} programs {total_s:>12.2f} s of compiling, on two threads"])


def _batches(items: list[T]) -> Iterator[list[T]]:
    """As many at once as a program takes."""
    for start in range(0, len(items), COPY_BUCKETS[-1]):
        yield items[start : start + COPY_BUCKETS[-1]]


def _padded(blocks: list[int], padding: int) -> np.ndarray:
    ids = np.full(bucket_for(len(blocks), COPY_BUCKETS), padding, np.int32)
    ids[: len(blocks)] = blocks
    return ids


# --- start-up -----------------------------------------------------------------------------------------------------


def make_mesh(tp: int) -> Mesh:
    """The first `tp` devices on the axis `tp`."""
    devices = jax.devices()
    if tp > len(devices):
        raise ConfigError(
            f"tp is {tp}, but this machine has {len(devices)} {devices[0].platform} device(s): lower --tp"
            + (
                " (for tests, XLA_FLAGS=--xla_force_host_platform_device_count=N)"
                if devices[0].platform == "cpu"
                else ""
            )
        )
    return Mesh(np.array(devices[:tp]), ("tp",), axis_types=(AxisType.Auto,))


def resolve_dtype(dtype: str, mesh: Mesh) -> Any:
    """auto: float32 on CPU, where it is the fast type, bfloat16 elsewhere."""
    if dtype == "auto":
        dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return jnp.dtype(dtype)


def set_up_compile_cache(directory: Path) -> None:
    """Keep every compiled program on disk, so that the next start only reads them."""
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _token_buckets(buckets: tuple[int, ...] | None, token_budget: int) -> tuple[int, ...]:
    if buckets is None:
        return buckets_up_to(token_budget, TOKEN_BUCKETS)
    if not buckets or sorted(set(buckets)) != list(buckets) or buckets[0] < 1:
        raise ConfigError(f"runner.token_buckets is {buckets}: give token counts in rising order")
    if buckets[-1] < token_budget:
        raise ConfigError(
            f"runner.token_buckets ends at {buckets[-1]}, below the token budget of {token_budget}: "
            "add a bucket of that size, or lower the budget"
        )
    return buckets


def _fingerprint(name: str, spec: ModelSpec, dtype: str, weights: str) -> str:
    return hashlib.blake2b(f"{name}|{spec!r}|{dtype}|{weights}".encode(), digest_size=16).hexdigest()


@jax.jit
def _checksum(weight: jax.Array) -> jax.Array:
    """Two 32-bit sums over every bit, each number weighted by its place."""
    bits = jax.lax.bitcast_convert_type(weight, jnp.dtype(f"uint{8 * weight.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.arange(weight.size, dtype=jnp.uint32).reshape(weight.shape)
    return jnp.stack([(bits * (place * jnp.uint32(factor) + 1)).sum() for factor in (2654435762, 2246822520)])
