"""The same question put to the real engine: a request is made to give way, and comes back one way or the other.

A first request runs; a second one that needs the whole pool waits for it, and a third that fits beside the first
overtakes it (FlashGen's order). When the first has ended, the third must give back all of its blocks, and the second
writes over every one of them. When that has ended, the third comes back, alone on the device: what counts is the time
from there to its next token. Copying out is measured apart, because with write-through it has happened before.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from bench.noise import Noise
from bench.recompute_vs_swap.simulation import Way
from bench.recompute_vs_swap.sweeps import Sweep
from bench.tier_engines import make_runner, plain_engine, tiered_engine
from jserve import calibrate
from jserve.cache.cost import CostModel, swap_or_recompute
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.engine import Engine
from jserve.errors import JserveError
from jserve.progress import Progress
from jserve.request import EngineRequest, SamplingParams
from jserve.runner import Runner
from jserve.transfer import JaxTransfer

WAYS: tuple[Way, ...] = ("recompute", "swap", "auto")
BUDGET = 256
"""Tokens of a step: what the engine takes on a CPU."""
FIRST, HEAD, LATE = "first", "head", "late"
MARGIN_BLOCKS = 8
"""Beyond what the late one's prompt takes: for the first one, and for what both say."""
STEPS_AT_MOST = 10_000


@dataclass(frozen=True)
class Return:
    """One request that gave way."""

    tokens: int
    """With KV when it did."""
    back_s: float
    """From the first moment when there was room for it until its next token."""
    how: str
    """What the engine says that it did."""
    said: list[int]


def pool_blocks(tokens: int, block_size: int) -> int:
    """For a late request with a prompt of so many tokens."""
    return -(-tokens // block_size) + MARGIN_BLOCKS


@dataclass(frozen=True)
class Measured:
    """What the machine says."""

    sweep: Sweep
    cost: CostModel
    """What the engine decides by."""
    same_tokens: bool
    """Whether every way gave the same answers."""
    auto_swapped: int
    """Lengths at which auto chose to swap."""
    others_cores: float
    """That other processes took meanwhile."""

    def metrics(self) -> dict[str, float]:
        curves = self.sweep.curves
        shares = [swap / recompute for swap, recompute in zip(curves["swap"], curves["recompute"], strict=True)]
        return {
            "auto_worst_excess": self.sweep.worst_excess,
            "auto_swapped": self.auto_swapped,
            "swap_over_recompute_shortest": shares[0],
            "swap_over_recompute_longest": shares[-1],
            "same_tokens": int(self.same_tokens),
            "others_cores": self.others_cores,
        }


def measure(
    model: str | None, shape: str | None, lengths: Sequence[int], turns: int, seed: int, progress: Progress
) -> Measured:
    """Medians of `turns` for each length, the three ways in turns; the first turn warms up."""
    config = EngineConfig(
        model=model,
        cache=CacheConfig(device_blocks=pool_blocks(max(lengths), 8), host_gib=1.0),
        sched=SchedConfig(max_running=3, order="flashgen", token_budget=BUDGET),
        runner=RunnerConfig(token_buckets=(4, 64, BUDGET)),
    )
    runner = make_runner(config, shape, progress)
    try:
        cost = calibrate.measure(config, runner, JaxTransfer(runner), progress)
        with progress.track("giving way", len(lengths) * (turns + 1) * len(WAYS)) as task:
            noise = Noise()
            seen = {n: _returns(config, runner, cost, n, turns, seed, task.advance) for n in lengths}
            others_cores = noise.others_cores()
        return _told(seen, runner, cost, others_cores)
    finally:
        runner.close()


def _returns(
    config: EngineConfig, runner: Runner, cost: CostModel, length: int, turns: int, seed: int, tick: Callable[[], None]
) -> dict[Way, list[Return]]:
    rng = random.Random(f"{seed} {length}")
    prompt = [rng.randrange(runner.info.vocab_size) for _ in range(length)]
    seen: dict[Way, list[Return]] = {way: [] for way in WAYS}
    for turn in range(turns + 1):
        for way in WAYS if turn % 2 else WAYS[::-1]:
            found = give_way(_engine(config, runner, cost, way, length), prompt)
            seen[way] += [found] if turn else []
            tick()
    return seen


def _told(
    seen: Mapping[int, Mapping[Way, Sequence[Return]]], runner: Runner, cost: CostModel, others_cores: float
) -> Measured:
    curves: dict[str, list[float]] = {
        way: [median(found.back_s for found in returns[way]) for returns in seen.values()] for way in WAYS
    }
    had = [returns["auto"][0].tokens for returns in seen.values()]
    decisions = [swap_or_recompute(cost, tokens, written_tokens=tokens) for tokens in had]
    curves["copy_out"] = [_copy_out_s(runner, tokens // runner.info.block_size) for tokens in had]
    curves["recompute_predicted"] = [decision.recompute_s for decision in decisions]
    curves["swap_predicted"] = [decision.swap_s for decision in decisions]
    hows = [returns["auto"][-1].how for returns in seen.values()]
    notes = [f"{length} tokens: auto chose to {how}" for length, how in zip(seen, hows, strict=True)]
    same = all(len({tuple(found.said) for way in WAYS for found in returns[way]}) == 1 for returns in seen.values())
    title = f"giving way on {runner.info.model}, {runner.info.backend}: from room for it to its next token"
    sweep = Sweep(title, "tokens of the prompt", list(seen), curves, notes)
    return Measured(sweep, cost, same, hows.count("swap"), others_cores)


def give_way(engine: Engine, prompt: list[int]) -> Return:
    """See the module. JserveError if the engine does not do what the scene asks of it."""
    scene, size = _Scene(engine), engine.info.block_size
    whole = engine.cache.num_blocks * size
    scene.add(FIRST, prompt[:size], 2 * size)
    scene.play(lambda: bool(scene.said[FIRST]))
    scene.add(HEAD, [(token + 1) % engine.info.vocab_size for token in _repeated(prompt, whole - 2)], 2)
    scene.add(LATE, prompt, 4 * size)
    scene.play(lambda: HEAD in scene.ended)
    before = len(scene.said[LATE])
    start_s = time.perf_counter()
    scene.play(lambda: len(scene.said[LATE]) > before)
    back_s = time.perf_counter() - start_s
    scene.play(lambda: LATE in scene.ended)
    moments = {moment.kind: moment for moment in engine.history(LATE).timelines[0].moments}
    head_end_s = engine.history(HEAD).timelines[0].moments[-1].time_s
    if not {"preempted", "resumed"} <= moments.keys() or moments["resumed"].time_s < head_end_s or not before:
        raise JserveError("the late request did not give way, or came back before there was room: use longer lengths")
    return Return(len(prompt) + before - 1, back_s, moments["preempted"].detail.partition(",")[0], scene.said[LATE])


def _repeated(prompt: list[int], count: int) -> list[int]:
    return (prompt * (count // len(prompt) + 1))[:count]


class _Scene:
    """Requests on an engine, and what they have said."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.said: dict[str, list[int]] = {}
        self.ended: set[str] = set()

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        self.said[name] = []
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self._engine.add(EngineRequest(request_id=name, token_ids=prompt, sampling=sampling, cache_salt=name))

    def play(self, until: Callable[[], bool]) -> None:
        for _ in range(STEPS_AT_MOST):
            if until():
                return
            if not self._engine.has_work:
                break
            for output in self._engine.step():
                self.said[output.request_id] += output.token_ids
                self.ended |= {output.request_id} if output.finish_reason else set()
        raise JserveError("nothing came of it: nobody gave way, or it never came back")


def _engine(config: EngineConfig, runner: Runner, cost: CostModel, way: Way, length: int) -> Engine:
    """Recompute without a host tier; the others with one that holds all."""
    config = replace(config, sched=replace(config.sched, preempt=way))
    blocks = pool_blocks(length, runner.info.block_size)
    if way == "recompute":
        return plain_engine(config, runner, blocks)
    return tiered_engine(config, runner, blocks, 4 * blocks, cost)


def _copy_out_s(runner: Runner, blocks: int) -> float:
    """Median of three, after one."""
    transfer, times_s = JaxTransfer(runner), []
    for ticket in range(4):
        transfer.store(ticket, list(range(blocks)), list(range(blocks)))
        while not (ended := transfer.poll()):
            time.sleep(0)
        times_s.append(ended[0].seconds)
    transfer.close()
    return median(times_s[1:])
