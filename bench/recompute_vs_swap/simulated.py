"""The simulated half of the study: its sweeps, what follows from them, and its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.recompute_vs_swap.crowds import Point, crowds, overhead, served
from bench.recompute_vs_swap.simulation import Way, as_served, over_time
from bench.recompute_vs_swap.sweeps import Sweep, block_size, evicted_tokens, parity_block_size, parity_exact
from jserve.progress import Progress

EXACT = ("evicted_tokens", "block_size")
"""Sweeps that are formulas alone."""
SERVED = ("kv_memory_zipf", "models", "mixed")
"""Sweeps that are played with each way of preemption too."""


@dataclass(frozen=True)
class Study:
    """What the simulations have found."""

    sweeps: Mapping[str, Sweep]
    over_time: Mapping[str, Mapping[str, Sequence[float]]]
    """For each way, the first point of sweep C: blocks in use, and tokens/s."""

    def metrics(self) -> dict[str, float]:
        sweeps = self.sweeps
        compared = {name: sweep for name, sweep in sweeps.items() if not math.isnan(sweep.worst_error)}
        return {
            "auto_worst_excess": max(sweep.worst_excess for sweep in sweeps.values()),
            "auto_best_gain": max(sweep.best_gain for sweep in sweeps.values()),
            "parity_block_size": parity_block_size(),
            "parity_block_size_between": parity_exact(),
            "published_worst_error": max(sweeps[name].worst_error for name in EXACT),
            **{f"{name}_worst_error": sweep.worst_error for name, sweep in compared.items()},
            **{f"{name}_median_error": sweep.median_error for name, sweep in compared.items()},
        }


def study(seed: int, progress: Progress, *, short: bool = False) -> Study:
    """`short`: only the first and the last point of each sweep of many requests."""
    sweeps = {"evicted_tokens": evicted_tokens(), "block_size": block_size()}
    many = crowds(seed)
    if short:
        many = {name: replace(crowd, points=[crowd.points[0], crowd.points[-1]]) for name, crowd in many.items()}
    runs = sum(len(crowd.points) * (1 + 5 * (name in SERVED)) for name, crowd in many.items())
    with progress.track("simulating", runs) as task:
        for name, crowd in many.items():
            sweeps[name] = overhead(crowd, task.advance)
            if name in SERVED:
                sweeps[f"served_{name}"] = served(crowd, task.advance)
    return Study(sweeps, _over_time(many["kv_memory_zipf"].points[0]))


def _over_time(point: Point) -> Mapping[str, Mapping[str, Sequence[float]]]:
    ways: tuple[Way, ...] = ("recompute", "swap", "auto")
    runs = {
        way: as_served(point.model, point.requests, point.blocks, point.block_tokens, way, write_through=False)
        for way in ways
    }
    return {way: over_time(run, point.blocks) for way, run in runs.items()}
