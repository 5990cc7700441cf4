"""The simulator: the production engine, scheduler and cache over timed doors, on hardware described by numbers.

It is deterministic: the same work, system and settings give the same result to the last digit. Where nothing can
change for some decode steps, they are planned at once (`Scheduler.schedule`), which is what makes it quick.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

from jserve.cache.cost import CostModel, restore_strategy
from jserve.cache.disk_tier import DiskTier
from jserve.cache.hierarchy import TieredCache
from jserve.cache.host_tier import HostTier
from jserve.cache.kv_cache import KVCache
from jserve.cache.transfer import stores_a_step
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.doors import EngineInfo
from jserve.engine import Engine
from jserve.errors import ConfigError
from jserve.progress import Progress
from jserve.simulation.doors import (
    VOCAB_SIZE,
    InTurnTransfer,
    Spread,
    StepTime,
    TimedClock,
    TimedExecutor,
    TimedTransfer,
)
from jserve.simulation.gauges import Gauges, Observed
from jserve.simulation.playing import Span, play
from jserve.simulation.profiles import Hardware, ModelShape, cost_model, device_blocks
from jserve.simulation.workload import Users, Workload

MOST_STEPS_AT_ONCE = 64
"""More would hold up write-through, which copies once a plan."""


@dataclass(frozen=True)
class System:
    """What is simulated: a model on devices with memory below them, and the engine's settings."""

    cost: CostModel
    """The truth: what steps and copies take. The engine's own decisions get a copy, which it corrects as it does in
    production."""
    device_blocks: int
    model: str
    hardware: str
    config: EngineConfig
    max_model_len: int
    weight_bytes: int = 0
    token_budget: int = 2048
    host_s: float = 0.0
    """What the engine's Python adds to each step."""
    spread: Spread | None = None
    """How single steps vary; None: not at all."""

    @property
    def kv_bytes_per_token(self) -> float:
        return self.cost.block_bytes / self.cost.block_tokens

    def blocks_of(self, gib: float) -> int:
        return int(gib * 2**30) // self.cost.block_bytes


def system(
    gpu: Hardware,
    model: ModelShape,
    *,
    tp: int = 1,
    drives: int = 1,
    bytes_per_number: int = 2,
    max_model_len: int | None = None,
    cache: CacheConfig | None = None,
    sched: SchedConfig | None = None,
) -> System:
    """A model on `tp` devices. ConfigError if it does not fit."""
    cache, sched = cache or CacheConfig(), sched or SchedConfig()
    block = cache.block_size or 16
    blocks = cache.device_blocks or device_blocks(
        gpu,
        model,
        tp=tp,
        block_tokens=block,
        bytes_per_number=bytes_per_number,
        memory_fraction=cache.memory_fraction,
    )
    config = EngineConfig(
        model=model.name, tp=tp, cache=cache, sched=sched, runner=RunnerConfig(overlap=False), max_model_len=None
    )
    return System(
        cost_model(gpu, model, tp=tp, drives=drives, block_tokens=block, bytes_per_number=bytes_per_number),
        blocks,
        model.title,
        f"{tp} x {gpu.title}",
        config,
        max_model_len or model.context,
        int(model.weight_bytes(bytes_per_number)),
        sched.token_budget or 2048,
    )


def build(described: System) -> tuple[Engine, TimedExecutor]:
    """The production engine over timed doors."""
    clock = TimedClock()
    config = described.config
    executor = TimedExecutor(clock, StepTime(described.cost, described.spread), described.host_s)
    info = EngineInfo(
        model=described.model,
        fingerprint="simulated",
        vocab_size=2 * VOCAB_SIZE,
        max_model_len=described.max_model_len,
        block_size=described.cost.block_tokens,
        device_blocks=described.device_blocks,
        token_budget=described.token_budget,
        dtype=str(config.dtype),
        backend=f"simulated/{described.hardware}",
        weight_bytes=described.weight_bytes,
        pool_bytes=described.device_blocks * described.cost.block_bytes,
    )
    return Engine(config, info, executor, clock, _cache(described, clock, executor)), executor


def _cache(described: System, clock: TimedClock, executor: TimedExecutor) -> KVCache:
    """As `jserve.tiers.build_cache` makes it, over timed copies."""
    said, block = described.config.cache, described.cost.block_tokens
    if not said.host_gib:
        return KVCache(described.device_blocks, block, reuse=said.prefix_cache)
    host_blocks = described.blocks_of(said.host_gib)
    if host_blocks < 1:
        raise ConfigError(f"cache.host_gib is {said.host_gib}, less than one block: use more")
    disk = None
    if said.disk_dir is not None:
        disk = DiskTier(described.blocks_of(said.disk_gib), said.eviction)
    longest = -(-described.max_model_len // block)
    staging = longest if said.staging_gib is None else described.blocks_of(said.staging_gib)
    cost = copy.deepcopy(described.cost)
    beside = described.cost.copies_beside_steps
    return TieredCache(
        described.device_blocks,
        block,
        TimedTransfer(clock, described.cost) if beside else InTurnTransfer(clock, described.cost, executor),
        HostTier(host_blocks, said.eviction),
        disk,
        cost=cost,
        strategy=restore_strategy(said.restore),
        staging_blocks=min(staging, host_blocks),
        store_budget=stores_a_step(described.token_budget, block),
        wait_limit_s=said.load_timeout_s,
        device_reuse=said.device_reuse,
        read_ahead_s=said.read_ahead_s,
    )


@dataclass
class Simulated(Observed):
    """A run in simulated time."""

    system: System
    busy_s: float
    """Simulated time in which a step ran."""


def simulate(
    described: System,
    work: Workload,
    *,
    span: Span | None = None,
    progress: Progress | None = None,
    most_steps: int = MOST_STEPS_AT_ONCE,
    watch: Callable[[Engine], None] = lambda engine: None,
) -> Simulated:
    """Play the work on the system. ConfigError if one of its calls can never run there."""
    engine, executor = build(described)
    gauges = Gauges(engine)
    executor.on_launch = gauges.see
    users = Users(work, VOCAB_SIZE)
    clock = engine.clock
    assert isinstance(clock, TimedClock)
    clock.alarms.append(lambda: users.next_s)
    watch(engine)

    def look_ahead(engine: Engine, due_s: float) -> int:
        cache = engine.cache
        if isinstance(cache, TieredCache) and isinstance(cache.tiers.transfer, TimedTransfer):
            due_s = min(due_s, cache.tiers.transfer.next_read_s)  # then the next may start
        return executor.steps_until(engine.scheduler.running, due_s, most_steps)

    played = play(engine, work, span=span, progress=progress, look_ahead=look_ahead, users=users)
    return Simulated(played, gauges, described, executor.busy_s)


def with_policies(described: System, cache: CacheConfig, sched: SchedConfig) -> System:
    """The same model and devices under other settings; the pool keeps its size."""
    return replace(described, config=replace(described.config, cache=cache, sched=sched))
