"""Sweeps C and D on the real engine: many requests at once, by how much memory there is for KV, by count and length.

Nothing is written through, so that the ways differ only once somebody gives way, and a swap copies out and in, as the
poster's did. What counts is the time until the last request has ended: not the poster's sum of what giving way costs,
which on an engine that copies beside other requests' steps is no time that anybody waits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from bench.recompute_vs_swap.simulation import Request, Run, Sample, Way
from bench.recompute_vs_swap.sweeps import Sweep
from bench.recompute_vs_swap.turns import WAYS, curves_of, in_turns
from bench.tier_engines import plain_engine, tiered_engine
from bench.workloads.lengths import SHAREGPT
from jserve.cache.cost import CostModel
from jserve.cache.hierarchy import TieredCache
from jserve.engine import Engine
from jserve.request import EngineRequest, SamplingParams
from jserve.runner import Runner
from jserve.simulation.traces import read_trace

SHAREGPT_PROMPT, SHAREGPT_OUTPUT, SHAREGPT_CONTEXT = 1500, 1024, 8192
"""The poster's choice: conversations whose prompt and answer have at least so many tokens."""
HOST_BYTES = 60 << 30
"""For what was swapped out, at most: about the artifact's swap space, and what XLA pins unasked."""


@dataclass(frozen=True)
class Point:
    """One workload on so many tokens of KV, or as many more as its longest request needs."""

    x: float | str
    requests: Sequence[Request]
    kv_tokens: int

    def blocks(self, block_size: int) -> int:
        longest = max(request.prompt + request.output for request in self.requests)
        return max(self.kv_tokens // block_size, -(-longest // block_size) + 1)


@dataclass
class Played:
    """One workload, played to its end."""

    total_s: float = 0.0
    """Until the last request had ended."""
    preemptions: int = 0
    said: dict[str, list[int]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def as_run(self) -> Run:
        return Run(self.total_s, samples=self.samples)


PlayedWays = Mapping[Way, Sequence[Played]]


def play_each_way(
    runner: Runner, cost: CostModel, point: Point, turns: int, warm_up: int, seed: int, tick: Callable[[], None]
) -> PlayedWays:
    return in_turns(lambda way: play_once(runner, cost, point, way, seed), turns, tick, warm_up)


def play_once(runner: Runner, cost: CostModel, point: Point, way: Way, seed: int) -> Played:
    return play(_engine(runner, cost, way, point.blocks(runner.info.block_size)), point.requests, seed)


def same_tokens(played: PlayedWays) -> bool:
    first = played["recompute"][0].said
    return all(run.said == first for runs in played.values() for run in runs)


def sweep_of(title: str, x_label: str, points: Sequence[Point], played: Sequence[PlayedWays]) -> Sweep:
    curves = curves_of([{way: [run.total_s for run in ways[way]] for way in WAYS} for ways in played])
    victims = [float(median(run.preemptions for run in ways["recompute"])) for ways in played]
    title = f"{title}: until the last request has ended"
    return Sweep(title, x_label, [point.x for point in points], curves, (), victims)


def play(engine: Engine, requests: Sequence[Request], seed: int) -> Played:
    """All arrive at once, as in the poster. No two prompts share a block."""
    rng, played = random.Random(seed), Played()
    pool, counters = engine.cache.pool, engine.scheduler.stats
    for i, request in enumerate(requests):
        prompt = [rng.randrange(engine.info.vocab_size) for _ in range(request.prompt)]
        sampling = SamplingParams(max_tokens=request.output, ignore_eos=True)
        played.said[str(i)] = []
        engine.add(EngineRequest(request_id=str(i), token_ids=prompt, sampling=sampling, cache_salt=str(i)))
    left, start_s = len(requests), time.perf_counter()
    while left:
        for output in engine.step():
            played.said[output.request_id] += output.token_ids
            left -= output.finish_reason is not None
        held, tokens = pool.num_blocks - pool.num_free, counters.prefill_tokens + counters.decode_tokens
        now_s = time.perf_counter() - start_s
        played.samples.append(Sample(now_s, engine.scheduler.num_running, held, tokens))
    played.total_s = time.perf_counter() - start_s
    played.preemptions = counters.preemptions
    return played


def _engine(runner: Runner, cost: CostModel, way: Way, blocks: int) -> Engine:
    """In order of arrival, as the poster's vLLM; recompute without a host tier."""
    config = replace(runner.config, sched=replace(runner.config.sched, order="fcfs", preempt=way))
    if way == "recompute":
        return plain_engine(config, runner, blocks)
    engine = tiered_engine(config, runner, blocks, min(64 * blocks, HOST_BYTES // runner.block_bytes), cost)
    assert isinstance(engine.cache, TieredCache)
    engine.cache.stores.budget = 0
    return engine


def sharegpt_like(count: int, scale: int, seed: int) -> list[Request] | None:
    """ShareGPT's conversations of at least the poster's lengths, all divided by `scale`; None without the file."""
    if not SHAREGPT.exists():
        return None
    found = []
    for session in read_trace(SHAREGPT, SHAREGPT_CONTEXT).sessions:
        history = 0
        for turn in session.turns:
            prompt = history + turn.prompt_tokens
            if prompt >= SHAREGPT_PROMPT and turn.output_tokens >= SHAREGPT_OUTPUT:
                found.append(Request(prompt // scale, turn.output_tokens // scale))
            history = prompt + turn.output_tokens
    return random.Random(seed).sample(found, min(count, len(found)))
