"""Sweeps C, D and E: many requests at once through the production scheduler and cache, on the poster's machine.

Two questions are kept apart:

- `as_poster`: what its vLLM did. No block is reused, who gives way is noted, and each victim is charged both ways by
  the formulas of the fit: copied out and in, with nothing else meanwhile, or computed again.
- `as_served`: what jserve does (`SchedConfig.preempt`): copies run beside other requests' steps, blocks that nobody
  has taken are found again. What counts is the time until the last request has ended.

Steps and copies take what the cost model says (`jserve.simulation`); nothing is computed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bench.recompute_vs_swap.poster import Model, cost_model
from jserve.cache.hierarchy import TieredCache
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.request import EngineRequest, SamplingParams
from jserve.sched.plan import Row, StepPlan
from jserve.simulation.doors import StepTime
from jserve.simulation.simulator import System, build

BLOCK = 16
BUDGET = 8192
"""Tokens of a step: the artifact's."""
MAX_RUNNING = 256
HOST_GIB = 64.0
JUMP = 256
"""Decode steps that one plan may span; with write-through, which copies once a plan, only `FEW_STEPS`."""
FEW_STEPS = 2
Way = Literal["recompute", "swap", "auto"]
ZIPF_THETA = 0.6


@dataclass(frozen=True)
class Request:
    prompt: int
    output: int


@dataclass(frozen=True)
class Sample:
    """The engine after a step."""

    time_s: float
    running: int
    used_blocks: int
    tokens: int


@dataclass
class Run:
    """What happened to one workload."""

    total_s: float = 0.0
    victims: list[int] = field(default_factory=list)
    """Tokens with KV of each that gave way, when it came back."""
    recompute_s: float = 0.0
    """What the steps took longer because of tokens that had been computed before."""
    samples: list[Sample] = field(default_factory=list)


def fixed(count: int, prompt: int, output: int) -> list[Request]:
    return [Request(prompt, output)] * count


def zipf(count: int, shortest: int, longest: int, prompt_share: float, seed: int) -> list[Request]:
    """Lengths with P(shortest + k) falling as (k + 1)^-theta, each cut into prompt and output."""
    ranks = range(longest - shortest + 1)
    weights = [(k + 1) ** -ZIPF_THETA for k in ranks]
    lengths = [shortest + k for k in random.Random(seed).choices(ranks, weights, k=count)]
    prompts = [max(1, min(length - 1, round(length * prompt_share))) for length in lengths]
    return [Request(prompt, length - prompt) for prompt, length in zip(prompts, lengths, strict=True)]


def requests_of(said: Mapping[str, Any], count: int, seed: int) -> list[Request]:
    """As `published.json` describes them."""
    if "zipf" in said:
        shortest, longest = said["zipf"]
        return zipf(count, shortest, longest, said.get("prompt_share", 0.5), seed)
    return fixed(count, said["prompt"], said["output"])


def blocks_in(gigabytes: float, model: Model, block_tokens: int = BLOCK) -> int:
    return int(gigabytes * 1e9) // (block_tokens * model.kv_bytes_per_token)


def as_poster(model: Model, requests: Sequence[Request], blocks: int, block_tokens: int = BLOCK) -> Run:
    """Who gives way and when, if every victim loses all of its blocks and computes them again."""
    cache = CacheConfig(block_size=block_tokens, prefix_cache=False)
    return _play(requests, _system(model, requests, blocks, cache, "recompute"))


def as_served(
    model: Model, requests: Sequence[Request], blocks: int, block_tokens: int, way: Way, *, write_through: bool
) -> Run:
    """By this way of preemption, with host memory as large as the artifact's swap space where it takes any."""
    cache = CacheConfig(block_size=block_tokens, host_gib=0.0 if way == "recompute" else HOST_GIB)
    return _play(requests, _system(model, requests, blocks, cache, way), write_through=write_through)


def _system(model: Model, requests: Sequence[Request], blocks: int, cache: CacheConfig, way: Way) -> System:
    assert cache.block_size is not None
    sched = SchedConfig(max_running=MAX_RUNNING, order="fcfs", preempt=way)
    return System(
        cost_model(model, cache.block_size),
        blocks,
        model.title,
        "A100 40 GB of the poster",
        EngineConfig(cache=cache, sched=sched, runner=RunnerConfig(overlap=False)),
        max_model_len=1 + max(request.prompt + request.output for request in requests),
        token_budget=BUDGET,
    )


def _play(requests: Sequence[Request], system: System, *, write_through: bool = False) -> Run:
    """All arrive at once; until the last one has ended."""
    engine, executor = build(system)
    if isinstance(engine.cache, TieredCache) and not write_through:
        engine.cache.stores.budget = 0  # what gives way is copied out then, as vLLM did
    watch = _Watch(StepTime(system.cost))
    executor.on_launch = watch.launched
    for i, request in enumerate(requests):
        engine.add(_engine_request(i, request))
    counters, pool = engine.scheduler.stats, engine.cache.pool
    while engine.timelines.counts["finished"] < len(requests):
        engine.step(FEW_STEPS if write_through else JUMP)
        held, tokens = pool.num_blocks - pool.num_free, counters.prefill_tokens + counters.decode_tokens
        watch.run.samples.append(Sample(engine.clock.now(), len(engine.scheduler.running), held, tokens))
    watch.run.total_s = engine.clock.now()
    return watch.run


def _engine_request(i: int, request: Request) -> EngineRequest:
    first = i * (1 << 16)  # no two prompts share a block
    return EngineRequest(
        request_id=str(i),
        token_ids=list(range(first, first + request.prompt)),
        sampling=SamplingParams(max_tokens=request.output, ignore_eos=True),
    )


class _Watch:
    """Sees every step plan, and knows what in it had been computed before."""

    def __init__(self, step_time: StepTime) -> None:
        self.step_time = step_time
        self.run = Run()
        self._end: dict[str, int] = {}
        """Where each sequence's last row ended; `_high`: the farthest that any has."""
        self._high: dict[str, int] = {}

    def launched(self, plan: StepPlan, seconds: float) -> None:
        decodes, chunks = plan.rows[: plan.num_decodes], plan.rows[plan.num_decodes :]
        again = [max(0, self._high.get(row.sequence.request_id, 0) - row.start) for row in chunks]
        if any(again):
            self.run.recompute_s += seconds - self._seconds_without(decodes, chunks, again)
        for row in chunks:
            name = row.sequence.request_id
            if row.start < self._end.get(name, 0):
                self.run.victims.append(self._end[name])
            self._note(name, row.start + row.count)
        for row in decodes:
            self._note(row.sequence.request_id, row.start + plan.steps)

    def _note(self, name: str, end: int) -> None:
        self._end[name] = end
        self._high[name] = max(end, self._high.get(name, 0))

    def _seconds_without(self, decodes: Sequence[Row], chunks: Sequence[Row], again: Sequence[int]) -> float:
        """What the plan would take if the first `again` tokens of each chunk had been kept."""
        kept = [
            Row(row.sequence, row.start + skip, row.count - skip, row.samples)
            for row, skip in zip(chunks, again, strict=True)
            if skip < row.count
        ]
        new = [row for row in kept if row.count == 1]  # they only had their newest token to compute
        plan = StepPlan([*decodes, *new, *(row for row in kept if row.count > 1)], num_decodes=len(decodes) + len(new))
        return self.step_time.seconds(plan) if plan.rows else 0.0


def over_time(run: Run, blocks: int, points: int = 80) -> dict[str, list[float]]:
    """Blocks in use and tokens/s (prompts' tokens too, as the artifact counts) over equal parts of the time."""
    edges = np.linspace(0.0, run.total_s, points + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    times = [0.0, *(sample.time_s for sample in run.samples)]
    used = np.interp(middles, times, [0, *(sample.used_blocks for sample in run.samples)])
    tokens = np.interp(edges, times, [0, *(sample.tokens for sample in run.samples)])
    return {
        "time_s": [round(float(x), 2) for x in middles],
        "kv_usage_percent": [round(float(x), 1) for x in 100 * used / blocks],
        "tokens_per_s": [round(float(x), 1) for x in np.diff(tokens) / (run.total_s / points)],
    }
