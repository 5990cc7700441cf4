"""Pictures of simulations. matplotlib is imported when it is needed: it comes with the extra `notebook`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jserve.errors import Unsupported

if TYPE_CHECKING:
    from jserve.simulation.command import Row


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes, of its own: no display, and no state of pyplot's. Raises Unsupported."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Unsupported("the picture needs matplotlib, which is missing: pip install 'jserve[notebook]'") from None
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_rows(rows: Sequence[Row], title: str, path: Path) -> None:
    """Latency against throughput, TTFT and hits by load, and the KV pool over time under the last load."""
    figure, axes = new_figure(2, 2, (11, 7))
    (latency, ttft), (hits, memory) = axes
    policies = list(dict.fromkeys(row.policy for row in rows))
    loads = list(dict.fromkeys(row.load for row in rows))
    for policy in policies:
        mine = [row for row in rows if row.policy == policy]
        latency.plot(
            [row.summary.output_tokens_per_s for row in mine],
            [1e3 * row.summary.normalised_latency_s for row in mine],
            marker="o",
            label=policy,
        )
        ttft.plot([row.load for row in mine], [row.summary.ttft_p95_s for row in mine], marker="o", label=policy)
        samples = mine[-1].run.gauges.samples
        memory.plot([sample.time_s for sample in samples], [sample.held for sample in samples], label=policy, lw=0.8)
    _stack_hits(hits, rows, loads, policies)
    latency.set(xlabel="output tokens/s", ylabel="ms for each output token", title="latency (simulated)")
    ttft.set(ylabel="P95 TTFT, s", title="time to first token")
    memory.set(xlabel="s", ylabel="share of KV blocks held", ylim=(0, 1.02), title=f"memory, {loads[-1]}")
    for axis in (latency, ttft, memory):
        axis.legend(fontsize="small")
        axis.grid(True, alpha=0.2)
    figure.suptitle(title)
    figure.savefig(path)


def _stack_hits(axis: Any, rows: Sequence[Row], loads: list[str], policies: list[str]) -> None:
    width = 0.8 / len(policies)
    colors = dict(zip(("device", "host", "disk"), ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for i, policy in enumerate(policies):
        places = [loads.index(row.load) + (i - (len(policies) - 1) / 2) * width for row in rows if row.policy == policy]
        below = [0.0] * len(places)
        for tier, color in colors.items():
            shares = [getattr(row.summary, f"{tier}_hit_share") for row in rows if row.policy == policy]
            axis.bar(places, shares, 0.9 * width, bottom=below, color=color, label=tier if i == 0 else None)
            below = [a + b for a, b in zip(below, shares, strict=True)]
    axis.set(title="prompt tokens found, by tier (bars: policies in order)", ylim=(0, 1.02))
    axis.set_xticks(range(len(loads)), loads)
    axis.legend(fontsize="small")
