"""The three ways take turns, so that what else the machine does meets all of them; and what is told of their times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

from bench.recompute_vs_swap.simulation import Way
from bench.recompute_vs_swap.sweeps import Curve

WAYS: tuple[Way, ...] = ("recompute", "swap", "auto")
T = TypeVar("T")


def in_turns(run: Callable[[Way], T], turns: int, tick: Callable[[], None], warm_up: int = 1) -> dict[Way, list[T]]:
    """What each way gave, so many times; `warm_up` turns before that are thrown away."""
    seen: dict[Way, list[T]] = {way: [] for way in WAYS}
    for turn in range(-warm_up, turns):
        for way in WAYS if turn % 2 else WAYS[::-1]:
            result = run(way)
            seen[way] += [result] if turn >= 0 else []
            tick()
    return seen


def curves_of(points: Sequence[Mapping[Way, Sequence[float]]]) -> dict[str, Curve]:
    """Medians of the times by way, and `noise`: half of what lies between the least and the most of one way's times, as
    a share of their median, for the way where that is most. A smaller difference between two ways says nothing.
    """
    curves: dict[str, Curve] = {way: [median(times[way]) for times in points] for way in WAYS}
    curves["noise"] = [max(_spread(times) for times in point.values()) for point in points]
    return curves


def _spread(times: Sequence[float]) -> float:
    return (max(times) - min(times)) / 2 / median(times)
