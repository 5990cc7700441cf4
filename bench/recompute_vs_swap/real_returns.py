"""Sweeps A and B on the real engine: one request gives way and comes back (`scene`), by what it had and by block size.

Its full blocks have been written through by then, so that a swap copies them in alone; copying out is measured apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.recompute_vs_swap.copying import pageable, pinned
from bench.recompute_vs_swap.scene import Return, give_way, pool_blocks
from bench.recompute_vs_swap.simulation import Way
from bench.recompute_vs_swap.sweeps import Sweep
from bench.recompute_vs_swap.turns import WAYS, curves_of, in_turns
from bench.tier_engines import plain_engine, tiered_engine
from jserve.cache.cost import CostModel, swap_or_recompute
from jserve.engine import Engine
from jserve.runner import Runner


@dataclass(frozen=True)
class Returned:
    """One point: how long it took to come back each way, and what the copies alone take."""

    x: int
    returns: Mapping[Way, Sequence[Return]]
    curves: Mapping[str, float]
    """Seconds by name: copies, and what the cost model predicts."""

    @property
    def same_tokens(self) -> bool:
        return len({tuple(found.said) for returns in self.returns.values() for found in returns}) == 1

    @property
    def auto_swapped(self) -> bool:
        return self.returns["auto"][-1].how == "swap"


def returned(
    runner: Runner, cost: CostModel, x: int, length: int, turns: int, seed: int, tick: Callable[[], None]
) -> Returned:
    """A prompt of `length` tokens, which depends on the seed."""
    rng = random.Random(f"{seed} {length}")
    prompt = [rng.randrange(runner.info.vocab_size) for _ in range(length)]
    seen = in_turns(lambda way: give_way(_engine(runner, cost, way, length), prompt), turns, tick)
    tokens = seen["auto"][0].tokens
    decision = swap_or_recompute(cost, tokens, written_tokens=tokens)
    blocks = tokens // runner.info.block_size
    copied = pinned(runner, blocks)
    curves = {
        "copy_out": copied.out_s,
        "copy_in": copied.in_s,
        "recompute_predicted": decision.recompute_s,
        "swap_predicted": decision.swap_s,
    }
    if not runner.copies_directly:
        slow = pageable(runner, blocks)
        curves |= {"copy_out_pageable": slow.out_s, "copy_in_pageable": slow.in_s}
    return Returned(x, seen, curves)


def sweep_of(title: str, x_label: str, points: Sequence[Returned]) -> Sweep:
    times = [{way: [found.back_s for found in point.returns[way]] for way in WAYS} for point in points]
    names = points[0].curves
    curves = curves_of(times) | {name: [point.curves[name] for point in points] for name in names}
    notes = [f"{point.x}: auto chose to {point.returns['auto'][-1].how}" for point in points]
    return Sweep(f"{title}: from room for it to its next token", x_label, [p.x for p in points], curves, notes)


def _engine(runner: Runner, cost: CostModel, way: Way, length: int) -> Engine:
    """Recompute without a host tier; the others with one that holds all."""
    config = replace(runner.config, sched=replace(runner.config.sched, preempt=way))
    blocks = pool_blocks(length, runner.info.block_size)
    if way == "recompute":
        return plain_engine(config, runner, blocks)
    return tiered_engine(config, runner, blocks, 4 * blocks, cost)
