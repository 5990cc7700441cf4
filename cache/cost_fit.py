"""The numbers of a `CostModel` from measured times: least squares, no number below zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

from jserve.cache.cost import DecodeCost, LinkCost, PrefillCost


def fit_prefill(samples: Iterable[tuple[int, int, float]]) -> PrefillCost:
    """From measured (new tokens, cached tokens, seconds)."""
    measured = list(samples)
    rows = [(1.0, float(n), n * (c + n / 2)) for n, c, _ in measured]
    overhead_s, per_token_s, per_pair_s = _fit(rows, [seconds for _, _, seconds in measured])
    return PrefillCost(overhead_s, per_token_s, per_pair_s)


def fit_decode(samples: Iterable[tuple[int, int, float]]) -> DecodeCost:
    """From measured (sequences, context tokens of all, seconds)."""
    measured = list(samples)
    rows = [(1.0, float(b), float(c)) for b, c, _ in measured]
    overhead_s, per_sequence_s, per_context_token_s = _fit(rows, [seconds for _, _, seconds in measured])
    return DecodeCost(overhead_s, per_sequence_s, per_context_token_s)


def fit_link(samples: Iterable[tuple[int, int, float]]) -> LinkCost:
    """From measured (bytes, copies, seconds)."""
    measured = list(samples)
    times = [seconds for _, _, seconds in measured]
    per_byte_s, per_copy_s = _fit([(float(size), float(copies)) for size, copies, _ in measured], times)
    if per_byte_s == 0:  # all copies were too small to tell: charge their bytes
        (per_byte_s,), per_copy_s = _fit([(float(size),) for size, _, _ in measured], times), 0.0
    return LinkCost(1 / per_byte_s, per_copy_s)


def _fit(rows: Sequence[tuple[float, ...]], times_s: Sequence[float]) -> list[float]:
    """Coefficients >= 0 with the least squared *relative* error, so that short times count as much as long ones.

    With three columns at most, the exact way is cheap: the best of the unconstrained fits over each set of columns
    among those that come out without a negative coefficient.
    """
    if not rows or min(times_s) <= 0:
        raise ValueError("a fit needs samples, each with a time above zero")
    scaled = [[x / t for x in row] for row, t in zip(rows, times_s, strict=True)]
    width = len(rows[0])
    best, best_error = [0.0] * width, math.inf
    for size in range(1, width + 1):
        for columns in combinations(range(width), size):
            solved = _least_squares([[row[i] for i in columns] for row in scaled])
            if solved is None or min(solved) < 0:
                continue
            error = sum((sum(row[i] * x for i, x in zip(columns, solved, strict=True)) - 1) ** 2 for row in scaled)
            if error < best_error:
                best_error = error
                best = [0.0] * width
                for i, x in zip(columns, solved, strict=True):
                    best[i] = x
    return best


def _least_squares(rows: list[list[float]]) -> list[float] | None:
    """x with the least |rows·x - 1|², by the normal equations of columns scaled to length one; None if singular."""
    width = len(rows[0])
    norms = [math.sqrt(sum(row[i] ** 2 for row in rows)) for i in range(width)]
    if min(norms) == 0:
        return None
    unit = [[x / norm for x, norm in zip(row, norms, strict=True)] for row in rows]
    system = [
        [sum(row[i] * row[j] for row in unit) for j in range(width)] + [sum(row[i] for row in unit)]
        for i in range(width)
    ]
    for i in range(width):
        pivot = max(range(i, width), key=lambda r: abs(system[r][i]))
        if abs(system[pivot][i]) < 1e-12:
            return None
        system[i], system[pivot] = system[pivot], system[i]
        for r in range(width):
            if r != i:
                factor = system[r][i] / system[i][i]
                system[r] = [x - factor * y for x, y in zip(system[r], system[i], strict=True)]
    return [system[i][width] / system[i][i] / norms[i] for i in range(width)]
