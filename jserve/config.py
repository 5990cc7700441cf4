"""Every setting of jserve, as one tree of frozen dataclasses, checked once at the door and printed at start-up.

This is the only module that reads the environment.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jserve.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16", "float16"]
Eviction = Literal["lru", "fifo", "lookahead", "returns"]
Order = Literal["fcfs", "flashgen", "priority", "slo", "pace", "prefix"]
Chunk = Literal["static", "adaptive"]
Admission = Literal["queue", "predict"]
Preempt = Literal["recompute", "swap", "auto"]
Victim = Literal["youngest", "largest", "cheapest"]
AttentionBackend = Literal["auto", "native", "xla", "pallas"]


PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


def cache_root() -> Path:
    """Where jserve keeps models, compiled programs and kernels: $JSERVE_CACHE_DIR, or ~/.cache/jserve."""
    chosen = os.environ.get("JSERVE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jserve"


def pinned_host_gib() -> float:
    """How much host memory XLA's GPU client pins at most: $XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB, or its default of 64."""
    said = os.environ.get(PINNED_LIMIT, "")
    try:
        return float(said) if said else 64.0
    except ValueError:
        raise ConfigError(f"{PINNED_LIMIT} is {said!r}: use a number of GiB, or unset it") from None


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache on the device, and the tiers below it."""

    block_size: int | None = None
    """Tokens in a block; None is 8 on CPU, where small blocks cost nothing and keep more of a history, else 16."""
    device_blocks: int | None = None
    """Blocks of the device pool; None: from the memory that is free beside weights and temporaries, on CPU 2 GiB."""
    memory_fraction: float = 0.9
    """Share of the free device memory that the pool may take when `device_blocks` is None."""
    prefix_cache: bool = True
    """Reuse the KV of earlier requests with the same prefix."""
    device_reuse: bool = True
    """With a host tier: keep the KV of ended requests on the device too, until its room is needed. Without it only the
    tiers below keep histories (CachedAttention)."""
    host_gib: float = 0.0
    """Host memory for KV that the device has no room for, in GiB; 0 is none."""
    disk_dir: str | None = None
    """A directory (or a TensorStore URL, such as s3://bucket/path) for KV that host memory has no room for. It outlives
    the server: a restart finds it. Needs host_gib, through which it is read and written."""
    disk_gib: float = 64.0
    """What the KV there may take, in GiB."""
    staging_gib: float | None = None
    """Host memory that reads from disk may hold for waiting requests; None: one request of the longest length."""
    restore: str = "cost"
    """How much of a history to load rather than compute: cost (what is measured to be quicker), flashgen (from disk
    only while another request waits), threshold:TOKENS (the same, and only more tokens than that), always, never."""
    eviction: Eviction = "returns"
    """What leaves a full tier first: returns (conversations whose return is predicted to be farthest away; lru where
    nothing can be predicted), lru, fifo, or lookahead (what no waiting request needs)."""
    read_ahead_s: float = 0.05
    """While no request waits for the disk, conversations that are predicted to return soon are read from it, with so
    many seconds of reading under way at once: a request that comes then waits for the disk that much longer. 0: it is
    read for requests alone."""
    load_timeout_s: float = 10.0
    """After so long, a request computes what has not come from a lower tier."""

    def __post_init__(self) -> None:
        _check(
            self.block_size is None or self.block_size >= 1,
            "cache.block_size",
            self.block_size,
            "use at least 1, or leave it out",
        )
        _check(
            self.device_blocks is None or self.device_blocks >= 1,
            "cache.device_blocks",
            self.device_blocks,
            "use at least 1 block, or leave it out to size the pool from free memory",
        )
        _check(0 < self.memory_fraction <= 1, "cache.memory_fraction", self.memory_fraction, "use a share in (0, 1]")
        _check(self.host_gib >= 0, "cache.host_gib", self.host_gib, "use 0 (no host tier) or more GiB")
        _check(self.disk_gib > 0, "cache.disk_gib", self.disk_gib, "use more than 0 GiB, or leave disk_dir out")
        _check(
            self.disk_dir is None or self.host_gib > 0,
            "cache.host_gib",
            self.host_gib,
            "the disk tier is read and written through host memory: give it some GiB, or leave disk_dir out",
        )
        _check(
            self.host_gib == 0 or self.prefix_cache,
            "cache.prefix_cache",
            self.prefix_cache,
            "a host tier keeps prefixes: turn it on, or leave host_gib out",
        )
        _check(
            self.staging_gib is None or self.staging_gib >= 0,
            "cache.staging_gib",
            self.staging_gib,
            "use 0 or more GiB, or leave it out",
        )
        _check(self.read_ahead_s >= 0, "cache.read_ahead_s", self.read_ahead_s, "use 0 (none) or more seconds")
        _check(self.load_timeout_s > 0, "cache.load_timeout_s", self.load_timeout_s, "use more than 0 seconds")


@dataclass(frozen=True)
class SchedConfig:
    """What one step may hold, and how long the queue may grow."""

    max_running: int = 64
    """Requests that may run at once: rows of a decode batch."""
    token_budget: int | None = None
    """Tokens of one step: decodes first, then prefill chunks. Bounds how long a prompt delays the others' tokens.
    None is 256 on CPU, else 2048, or twice max_running if that is more."""
    max_waiting: int = 1024
    """Requests that may wait; one more is refused with RESOURCE_EXHAUSTED."""
    max_waiting_tokens: int | None = None
    """Tokens of the prompts that may wait; None is no bound but that on the requests."""
    admission: Admission = "predict"
    """Who is refused: queue (where the queue is full, or a tenant has its share of a crowded one), predict (also
    whoever would not have its first token when it is due, by its SLO or deadline)."""
    tenant_weights: tuple[str, ...] = ()
    """Shares of competing tenants, as NAME=WEIGHT; whoever is not named has 1."""
    slo_ttft_s: float = 2.0
    """When a first token should come, where the request does not say: for orders slo, pace, and adaptive chunks."""
    slo_tpot_s: float = 0.2
    """What each further token may take, where the request does not say: how fast people read, for order pace."""
    order: Order = "flashgen"
    """Who starts first: fcfs (nobody passes one that does not fit), flashgen (in order of arrival too, but later ones
    that fit run until it does), priority, slo (least slack until the first token is due), pace (flashgen, but
    answers far ahead of their readers yield to who waits: wants host_gib, and preempt auto), prefix (most of the prompt
    cached, before at most 64 others)."""
    turn_tokens: int = 128
    """Order pace: tokens that a request has from each start on before it may have to yield for being ahead."""
    ahead_s: float = 40.0
    """Order pace: how far ahead of one who reads a token in slo_tpot_s an answer must be to yield."""
    promote_tokens: int | None = None
    """Who has more tokens to compute than this passes no earlier request: they would be computed again if it had to
    yield. None is no limit (FlashGen's rule). A step looks at no more than 32 such before it looks no further."""
    victim: Victim = "youngest"
    """Of those behind in that order, who gives blocks back first: youngest, largest, cheapest (least computed)."""
    preempt: Preempt = "recompute"
    """How that one comes back: recompute, swap (to the host and back; needs cache.host_gib), auto (what is quicker)."""
    chunk: Chunk = "static"
    """How much of prompts a step takes: static (up to the token budget), adaptive (as the latency targets allow)."""

    @property
    def max_open(self) -> int:
        """Requests at once, running and waiting; each of a request's n continuations is one."""
        return self.max_running + self.max_waiting

    def __post_init__(self) -> None:
        _check(self.max_running >= 1, "sched.max_running", self.max_running, "use at least 1")
        _check(
            self.token_budget is None or self.token_budget >= self.max_running,
            "sched.token_budget",
            self.token_budget,
            f"use at least max_running ({self.max_running}): every running request decodes one token a step",
        )
        _check(self.max_waiting >= 1, "sched.max_waiting", self.max_waiting, "use at least 1")
        _check(
            self.max_waiting_tokens is None or self.max_waiting_tokens >= 1,
            "sched.max_waiting_tokens",
            self.max_waiting_tokens,
            "use at least 1, or leave it out",
        )
        _check(
            self.promote_tokens is None or self.promote_tokens >= 0,
            "sched.promote_tokens",
            self.promote_tokens,
            "use 0 or more, or leave it out",
        )
        _check(self.turn_tokens >= 1, "sched.turn_tokens", self.turn_tokens, "use at least 1")
        _check(0 <= self.ahead_s < math.inf, "sched.ahead_s", self.ahead_s, "use 0 or more seconds")
        for name, values in (
            ("order", get_args(Order)),
            ("victim", get_args(Victim)),
            ("preempt", get_args(Preempt)),
            ("chunk", get_args(Chunk)),
            ("admission", get_args(Admission)),
        ):
            chosen = getattr(self, name)
            _check(chosen in values, f"sched.{name}", chosen, f"use one of {', '.join(values)}")
        for name in ("slo_ttft_s", "slo_tpot_s"):
            slo_s = getattr(self, name)
            _check(0 < slo_s < math.inf, f"sched.{name}", slo_s, "use more than 0 seconds")
        _check(
            self.slo_tpot_s <= self.slo_ttft_s,
            "sched.slo_tpot_s",
            self.slo_tpot_s,
            f"a first token takes a step too, and is due after slo_ttft_s = {self.slo_ttft_s}: lower it, or raise that",
        )
        self.weights()

    def weights(self) -> dict[str, float]:
        """Of the named tenants."""
        weights: dict[str, float] = {}
        for entry in self.tenant_weights:
            name, equals, weight = entry.rpartition("=")
            try:
                number = float(weight)
            except ValueError:
                number = 0.0
            ok = bool(equals) and 0 < number < math.inf and name not in weights
            _check(ok, "sched.tenant_weights", entry, "use NAME=WEIGHT, each name once, with a weight above 0")
            weights[name] = number
        return weights


@dataclass(frozen=True)
class RunnerConfig:
    """How compiled steps are made and run."""

    attention_backend: AttentionBackend = "auto"
    """auto: pallas on NVIDIA GPUs, native (C++) on CPU where a compiler is at hand, else xla."""
    token_buckets: tuple[int, ...] | None = None
    """Token counts that the backbone is compiled for; None chooses by platform and token budget."""
    overlap: bool = True
    """Launch step N+1 before the tokens of step N are read."""
    warmup: bool = True
    """Compile every program before the first request."""
    compile_cache_dir: Path | None = None
    """Where compiled programs are kept between runs; None is `<cache root>/xla`."""
    profile_dir: Path | None = None
    """Write a JAX profiler trace of some steps there, for TensorBoard and Perfetto."""
    profile_skip: int = 64
    """Steps before the trace."""
    profile_steps: int = 64
    """Steps of the trace."""

    def __post_init__(self) -> None:
        _check(self.profile_skip >= 0, "runner.profile_skip", self.profile_skip, "use 0 or more steps")
        _check(self.profile_steps >= 1, "runner.profile_steps", self.profile_steps, "use at least 1 step")


@dataclass(frozen=True)
class EngineConfig:
    """One engine: a model on a mesh, its KV cache and its scheduler."""

    model: str | None = None
    """A directory, a GGUF file or a hub id; None is the embedded default, SmolLM2-135M-Instruct."""
    dtype: DType = "auto"
    """auto: float32 on CPU, bfloat16 on GPU."""
    tp: int = 1
    """Devices that share each layer (mesh axis `tp`)."""
    max_model_len: int | None = None
    """Longest prompt plus output in tokens; None takes the model's own limit, bounded by the pool."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)

    def __post_init__(self) -> None:
        _check(self.tp >= 1, "tp", self.tp, "use at least 1")
        size, budget = self.cache.block_size, self.sched.token_budget
        if size is not None and budget is not None:
            check_budget(budget, size)
        _check(
            self.max_model_len is None or self.max_model_len >= 2,
            "max_model_len",
            self.max_model_len,
            "use at least 2 tokens, or leave it out",
        )

    def block_and_budget(self, platform: str) -> tuple[int, int]:
        """Tokens of a block, and of a step at most, where not told as this platform likes them. Raises ConfigError."""
        on_cpu = platform == "cpu"
        size = self.cache.block_size or (8 if on_cpu else 16)
        # Decodes take one token each: prompts have at least as much of a step.
        budget = self.sched.token_budget or max(2 * self.sched.max_running, 256 if on_cpu else 2048)
        check_budget(budget, size)
        return size, budget


def check_budget(token_budget: int, block_size: int) -> None:
    """Raises ConfigError if a step does not hold a block."""
    _check(
        token_budget >= block_size,
        "sched.token_budget",
        token_budget,
        f"it is smaller than a block of {block_size} tokens: raise it, or lower cache.block_size",
    )


@dataclass(frozen=True)
class ServerConfig:
    """The gRPC door."""

    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 is every interface of this machine."""
    port: int = 8475
    """0 takes a free port and prints it."""
    drain_timeout_s: float = 30.0
    """On SIGTERM, how long running requests may go on before they are cancelled."""

    def __post_init__(self) -> None:
        _check(0 <= self.port <= 65535, "server.port", self.port, "use 0 (any free port) to 65535")
        _check(self.drain_timeout_s >= 0, "server.drain_timeout_s", self.drain_timeout_s, "use 0 or more seconds")


def describe(config: Any, prefix: str = "") -> list[str]:
    """The settings as `name = value` lines, for the start-up print."""
    lines: list[str] = []
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            lines += describe(value, f"{prefix}{f.name}.")
        else:
            lines.append(f"{prefix}{f.name} = {value}")
    return lines


def _check(ok: bool, name: str, value: object, way_out: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}: {way_out}")
