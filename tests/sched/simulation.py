"""A production engine over the simulated executor, and workloads for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jserve.cache.cost import CostModel, DecodeCost, LinkCost, PrefillCost, restore_strategy
from jserve.cache.disk_tier import DiskTier
from jserve.cache.hierarchy import TieredCache
from jserve.cache.host_tier import HostTier
from jserve.cache.kv_cache import KVCache
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.doors import EngineInfo
from jserve.engine import Engine
from jserve.request import EngineOutput, EngineRequest, SamplingParams, Terms
from jserve.sched.events import Event
from jserve.sched.plan import StepPlan
from jserve.simulated import SimulatedClock, SimulatedExecutor, SimulatedTransfer, expected_tokens
from jserve.timeline import Timelines

VOCAB = 97


def make_engine(
    blocks: int = 64,
    block_size: int = 4,
    max_running: int = 8,
    budget: int = 16,
    overlap: bool = False,
    reuse: bool = False,
    context: int = 10_000,
    **sched: Any,
) -> Engine:
    clock = SimulatedClock()
    executor = SimulatedExecutor(clock, blocks, block_size, VOCAB)
    config = _config(blocks, block_size, max_running, budget, overlap, reuse, sched)
    return _engine(config, clock, executor, context)


def make_tiered_engine(
    blocks: int = 64,
    block_size: int = 4,
    max_running: int = 8,
    budget: int = 16,
    overlap: bool = False,
    host: int = 100,
    copy_s: float | Callable[[str, int], float] = 0.0,
    block_copy_s: float = 1e-6,
    fails: Callable[[str], bool] = lambda kind: False,
    wait_limit_s: float = 1.0,
    orders_loads: bool = False,
    disk: int = 0,
    device_reuse: bool = True,
    **sched: Any,
) -> Engine:
    """With a host tier, maybe a disk tier. Copies take `copy_s` a block, and are believed to take `block_copy_s`."""
    copies_s = copy_s if callable(copy_s) else lambda kind, count: copy_s * count
    clock = SimulatedClock()
    executor = SimulatedExecutor(clock, blocks, block_size, VOCAB)
    link = LinkCost(bytes_per_s=1 / block_copy_s)
    cache = TieredCache(
        blocks,
        block_size,
        SimulatedTransfer(clock, executor, host, copies_s, fails=fails, orders_loads=orders_loads),
        HostTier(host),
        DiskTier(disk) if disk else None,
        cost=CostModel(PrefillCost(0.0, 1e-3, 0.0), DecodeCost(0.01), link, link, link, link, block_size, 1),
        strategy=restore_strategy("always"),
        staging_blocks=host,
        wait_limit_s=wait_limit_s,
        device_reuse=device_reuse,
    )
    return _engine(_config(blocks, block_size, max_running, budget, overlap, True, sched), clock, executor, cache=cache)


def _config(
    blocks: int, block_size: int, max_running: int, budget: int, overlap: bool, reuse: bool, sched: dict[str, Any]
) -> EngineConfig:
    return EngineConfig(
        cache=CacheConfig(block_size=block_size, device_blocks=blocks, prefix_cache=reuse),
        sched=SchedConfig(max_running=max_running, token_budget=budget, **sched),
        runner=RunnerConfig(overlap=overlap),
    )


def _engine(
    config: EngineConfig,
    clock: SimulatedClock,
    executor: SimulatedExecutor,
    context: int = 10_000,
    cache: KVCache | None = None,
) -> Engine:
    size, blocks, budget = config.cache.block_size, config.cache.device_blocks, config.sched.token_budget
    assert size is not None
    assert blocks is not None
    assert budget is not None
    info = EngineInfo("simulated", "simulated", VOCAB, context, size, blocks, budget, "none", "simulated", 0, 0)
    engine = Engine(config, info, executor, clock, cache)
    engine.timelines = Recorder()
    return engine


class Recorder(Timelines):
    """Remembers every event too, in the order in which they were told."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def record(self, events: Iterable[Event], time_s: float) -> None:
        told = list(events)
        self.events += told
        super().record(told, time_s)


def events_of(engine: Engine) -> list[Event]:
    assert isinstance(engine.timelines, Recorder)
    return engine.timelines.events


def request(name: str, prompt: list[int], max_tokens: int, **more: Any) -> EngineRequest:
    return EngineRequest(request_id=name, token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens), **more)


@dataclass(frozen=True)
class Arrival:
    """A request that comes once so many steps have been made."""

    step: int
    request: EngineRequest

    @property
    def answer(self) -> list[int]:
        return expected_tokens(self.request.token_ids, self.request.sampling.max_tokens or 0, VOCAB)


def workload(seed: int, requests: int, most_tokens: int, gap: int = 4, terms_too: bool = False) -> list[Arrival]:
    """Prompts and answers of any length that fits into `most_tokens`, up to `gap` steps apart, on any terms."""
    rng = random.Random(seed)
    arrivals, step = [], 0
    for i in range(requests):
        step += rng.randrange(gap + 1)
        length = rng.randrange(1, most_tokens)
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        terms = Terms(priority=rng.randrange(3), tenant=rng.choice("ab")) if terms_too else Terms()
        answer = rng.randrange(1, most_tokens - length + 1)
        arrivals.append(Arrival(step, request(f"r{i}", prompt, answer, terms=terms)))
    return arrivals


@dataclass
class Run:
    """What a workload came to."""

    token_steps: dict[str, list[int]]
    """For each request, the steps after which its tokens were told."""
    tokens: dict[str, list[int]]
    events: list[tuple[str, str, str | None]]
    """Kind, request and who caused it."""
    preemptions: int

    def first(self, name: str) -> int:
        return self.token_steps[name][0]


def play(engine: Engine, arrivals: list[Arrival], max_steps: int = 1, limit: int = 100_000) -> Run:
    """Until idle. With `max_steps` above 1, plans never reach past the next arrival."""
    run = Run({}, {}, [], 0)
    todo = sorted(arrivals, key=lambda a: a.step)
    step = 0
    for _ in range(limit):
        while todo and todo[0].step <= step:
            engine.add(todo.pop(0).request)
        if not engine.has_work:
            if not todo:
                break
            step = todo[0].step
            continue
        room = todo[0].step - step if todo else max_steps
        made: list[StepPlan] = []
        _note_plans(engine, made)
        outputs = engine.step(max(1, min(max_steps, room)))
        before = step
        step += made[0].steps if made else 1
        for output in outputs:
            _take(run, output, before)
    else:
        raise AssertionError(f"still working after {limit} steps: {engine.stats()}")
    run.events = [(event.kind, event.request_id, event.by) for event in events_of(engine)]
    run.preemptions = engine.stats().preemptions
    return run


def _note_plans(engine: Engine, made: list[StepPlan]) -> None:
    launch = type(engine.executor).launch

    def noting(plan: StepPlan) -> Any:
        made.append(plan)
        return launch(engine.executor, plan)

    engine.executor.launch = noting  # type: ignore[method-assign]


def _take(run: Run, output: EngineOutput, before: int) -> None:
    steps = run.token_steps.setdefault(output.request_id, [])
    steps += range(before + 1, before + 1 + len(output.token_ids))
    run.tokens.setdefault(output.request_id, []).extend(output.token_ids)
