"""Sweeps A and B: one sequence gives way and comes back, by the formulas of the cost model.

Beside recompute and swap stands `auto`: what `swap_or_recompute` chooses. It is judged twice, by the formulas that it
chooses with and, where both ways were measured, by the published times, of which it knows nothing but the fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.table import Table

from bench import report
from bench.recompute_vs_swap.poster import cost_model, model_named, published
from jserve.cache.cost import CostModel, SwapDecision, swap_or_recompute

Curve = list[float]
CHOICES: Mapping[str, tuple[str, str]] = {
    "auto": ("recompute", "swap"),
    "auto_pageable": ("recompute", "swap_pageable"),
    "auto_one_way": ("recompute", "swap_one_way"),
    "auto_published": ("recompute_published", "swap_published"),
    "auto_pageable_published": ("recompute_published", "swap_pageable_published"),
}
"""Each curve that chooses, and the two that it chooses from."""


@dataclass(frozen=True)
class Sweep:
    """One figure's numbers: seconds of overhead for each x."""

    title: str
    x_label: str
    x: Sequence[float | str]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """By name: simulated ones, published ones (`*_published`)."""
    notes: Sequence[str] = ()
    victims: Curve = field(default_factory=list)
    """How many gave way at each x, where that is not one."""

    @property
    def worst_excess(self) -> float:
        """How much worse than the better of its two ways a choosing curve is at its worst point, as a share."""
        worst = 0.0
        for name, ways in CHOICES.items():
            if name in self.curves:
                others = zip(*(self.curves[way] for way in ways), strict=True)
                worst = max(worst, *(excess(x, min(best)) for x, best in zip(self.curves[name], others, strict=True)))
        return worst

    @property
    def best_gain(self) -> float:
        """How much better than the better of recompute and swap auto is at its best point, as a share."""
        ways = zip(self.curves["auto"], self.curves["recompute"], self.curves["swap"], strict=True)
        return max(-excess(auto, min(recompute, swap)) for auto, recompute, swap in ways)

    @property
    def worst_error(self) -> float:
        """The largest relative error of a simulated point against the published one."""
        return max(self._errors(), default=math.nan)

    @property
    def median_error(self) -> float:
        errors = self._errors()
        return median(errors) if errors else math.nan

    def _errors(self) -> list[float]:
        return [
            abs(simulated / there - 1)
            for name, curve in self.curves.items()
            if f"{name}_published" in self.curves and name not in CHOICES
            for simulated, there in zip(curve, self.curves[f"{name}_published"], strict=True)
            if there > 0
        ]


def excess(value: float, best: float) -> float:
    return value / best - 1 if best > 0 else (0.0 if value <= 0 else math.inf)


def evicted_tokens() -> Sweep:
    """A (figure 3): how many tokens the sequence had."""
    there = published()["evicted_tokens"]
    model = cost_model(model_named("llama-2-7b"), there["block_tokens"])
    return _sweep(
        f"A. tokens evicted (Llama-2-7B, block of {there['block_tokens']})",
        "evicted tokens",
        there["x"],
        [(model, tokens) for tokens in there["x"]],
        {name: there[name] for name in ("recompute", "swap")},
    )


def block_size() -> Sweep:
    """B (figure 2): how large a block is, and in which memory it is kept."""
    there = published()["block_size"]
    llama, tokens = model_named("llama-2-7b"), there["tokens"]
    names = ("recompute", "swap", "swap_pageable")
    sweep = _sweep(
        f"B. block size (Llama-2-7B, {tokens} tokens evicted)",
        "tokens in a block",
        there["x"],
        [(cost_model(llama, size), tokens) for size in there["x"]],
        {name: there[name] for name in names},
    )
    pageable = [swap_or_recompute(cost_model(llama, size, pageable=True), tokens) for size in there["x"]]
    curves = {
        "swap_pageable": [decision.swap_s for decision in pageable],
        "auto_pageable": [chosen(decision) for decision in pageable],
        "auto_pageable_published": [
            there["swap_pageable" if decision.swap else "recompute"][i] for i, decision in enumerate(pageable)
        ],
    }
    return Sweep(sweep.title, sweep.x_label, sweep.x, {**sweep.curves, **curves})


def _sweep(
    title: str, x_label: str, x: Sequence[float], points: Sequence[tuple[CostModel, int]], there: Mapping[str, Curve]
) -> Sweep:
    two_way = [swap_or_recompute(model, tokens) for model, tokens in points]
    one_way = [swap_or_recompute(model, tokens, written_tokens=tokens) for model, tokens in points]
    return Sweep(
        title,
        x_label,
        x,
        {
            "recompute": [decision.recompute_s for decision in two_way],
            "swap": [decision.swap_s for decision in two_way],
            "auto": [chosen(decision) for decision in two_way],
            "swap_one_way": [decision.swap_s for decision in one_way],
            "auto_one_way": [chosen(decision) for decision in one_way],
            "auto_published": [
                there["swap" if decision.swap else "recompute"][i] for i, decision in enumerate(two_way)
            ],
            **{f"{name}_published": list(curve) for name, curve in there.items()},
        },
    )


def chosen(decision: SwapDecision) -> float:
    return decision.swap_s if decision.swap else decision.recompute_s


def parity_block_size() -> int:
    """The swept block size at which recompute and swap are nearest each other."""
    sweep = block_size()
    pairs = zip(sweep.x, sweep.curves["recompute"], sweep.curves["swap"], strict=True)
    return int(min(pairs, key=lambda point: abs(math.log(point[2] / point[1])))[0])


def parity_exact() -> float:
    """The same between the swept sizes: where the two formulas are equal.

    Swapping takes `bytes/bandwidth`, whatever the block size, and a fixed time for each of tokens/size blocks.
    """
    tokens = published()["block_size"]["tokens"]
    model = cost_model(model_named("llama-2-7b"), 1)
    bytes_s = 2 * tokens * model.block_bytes / model.host_to_device.bytes_per_s
    copies_s = 2 * tokens * model.host_to_device.per_copy_s
    parity: float = copies_s / (model.prefill.seconds(tokens) - bytes_s)
    return parity


def table(sweep: Sweep) -> Table:
    """A row for each x."""
    columns = (sweep.x_label, *(name.replace("_", " ") for name in sweep.curves))
    rows = [(x, *(curve[i] for curve in sweep.curves.values())) for i, x in enumerate(sweep.x)]
    return report.table(f"{sweep.title}, seconds", columns, rows)
