"""What write-through adds to decode: the same steps with and without a host tier, in turns.

A row fills a block once in `block_size` steps, and the rows are staggered, so the steps of one such period differ, and
their copies with them. What counts is the mean over the period's places of each place's median: a median alone would
not see a copy that few steps start, and a mean alone sees whatever else the machine does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from bench.tier_engines import finish, plain_engine, tiered_engine
from jserve.cache.cost import CostModel
from jserve.config import EngineConfig
from jserve.engine import Engine
from jserve.errors import ConfigError
from jserve.request import EngineRequest, SamplingParams
from jserve.runner import Runner

SETTLE_STEPS = 8
"""Before the clock runs: the prompts' own blocks are written through in these."""


@dataclass(frozen=True, slots=True)
class Work:
    """`batch` rows decode `steps` tokens each after about `context` tokens."""

    batch: int
    context: int
    steps: int

    def blocks(self, block_size: int) -> int:
        """That all rows take, each on its own."""
        return self.batch * (-(-(self.context + SETTLE_STEPS + self.steps + 8) // block_size) + 2)


@dataclass(frozen=True, slots=True)
class Pair:
    """Seconds of each step, measured one right after the other."""

    plain_s: list[float]
    tiered_s: list[float]
    stored_blocks: int


@dataclass(frozen=True, slots=True)
class Compared:
    """Of some pairs: one step, in the mean."""

    plain_s: float
    tiered_s: float

    @property
    def overhead(self) -> float:
        return self.tiered_s / self.plain_s - 1


def measure(
    config: EngineConfig, runner: Runner, cost: CostModel, work: Work, pairs: int, seed: int, tick: Callable[[], None]
) -> list[Pair]:
    blocks = runner.info.device_blocks
    found = []
    for i in range(pairs + 1):
        plain, tiered = plain_engine(config, runner, blocks), tiered_engine(config, runner, blocks, blocks, cost)
        taken_s = {}
        for engine in (plain, tiered) if i % 2 else (tiered, plain):
            taken_s[engine] = _step_seconds(engine, work, random.Random(seed))
            tick()
        if i:  # the first pair warms up
            found.append(Pair(taken_s[plain], taken_s[tiered], int(tiered.cache.stats()["stored_blocks"])))
    return found


def compare(pairs: Sequence[Pair], period: int) -> Compared:
    """`period`: steps after which the same work comes again, the block size."""
    return Compared(
        _typical([pair.plain_s for pair in pairs], period), _typical([pair.tiered_s for pair in pairs], period)
    )


def _typical(runs: Sequence[Sequence[float]], period: int) -> float:
    """Mean over the places in the period of the median of all steps at that place."""
    return mean(median(t for run in runs for t in run[place::period]) for place in range(min(period, len(runs[0]))))


def _step_seconds(engine: Engine, work: Work, rng: random.Random) -> list[float]:
    """Of steps in which every row decodes."""
    size = engine.info.block_size
    shared = max(1, work.context - size)
    head = [rng.randrange(engine.info.vocab_size) for _ in range(shared)]  # computed once, so that the start is quick
    names = [f"row {i}" for i in range(work.batch)]
    for i, name in enumerate(names):
        tail = [rng.randrange(engine.info.vocab_size) for _ in range(size + i % size)]
        engine.add(EngineRequest(request_id=name, token_ids=head + tail, sampling=SamplingParams()))
    full_steps = 0
    while full_steps < SETTLE_STEPS:
        outputs = engine.step()
        full_steps += len(outputs) == work.batch
        if any(output.finish_reason for output in outputs):
            raise ConfigError(f"{work.batch} rows never decode together: use a smaller --batch or --context")
    times_s = []
    for _ in range(work.steps):
        start_s = time.perf_counter()
        engine.step()
        times_s.append(time.perf_counter() - start_s)
    finish(engine, names)
    return times_s
