"""The figures of `bench.flashgen`, from the points that it has written: never from anything else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import flashgen_published as published
from bench.flashgen_runs import Point, read_points
from jserve.simulation.arms import ARMS
from jserve.simulation.plots import new_figure

Points = Sequence[dict[str, Any]]
DETAIL, HOST_GB = "opt-30b", 224.0


def draw_all(simulated: Sequence[Point], directory: Path) -> list[Path]:
    """Every figure whose points are there."""
    points = [
        point.as_dict() | {"tpot_percentiles_s": point.tpot_s, "utilisation": point.utilisation} for point in simulated
    ]
    directory.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[Points], Any]] = {
        "latency": _latency,
        "ttft": _ttft,
        "tpot": _tpot,
        "tiers": _tiers,
        "utilisation": _utilisation,
        "host_size": _host_size,
        "long_context": _long_context,
    }
    drawn = []
    for name, draw in figures.items():
        figure = draw(points)
        if figure is not None:
            figure.savefig(path := directory / f"flashgen-{name}.png")
            drawn.append(path)
    return drawn


def _of(points: Points, **wanted: Any) -> list[dict[str, Any]]:
    """The points with these values, by clients."""
    found = [p for p in points if all(p[name] == value for name, value in wanted.items())]
    return sorted(found, key=lambda p: p["clients"])


def _shared(points: Points, model: str, arm: str) -> list[dict[str, Any]]:
    return _of(points, model=model, arm=arm, work="sharegpt", host_gb=HOST_GB)


def _latency(points: Points) -> Any:
    """Figure 9: normalised latency against throughput."""
    models = sorted({p["model"] for p in points})
    figure, (row,) = new_figure(1, len(models), (4.2 * len(models), 3.8))
    for axis, model in zip(row, models, strict=True):
        for arm in ARMS:
            curve = _shared(points, model, arm)
            if curve:
                xs = [p["output_tokens_per_s"] for p in curve]
                axis.plot(xs, [1e3 * p["normalised_latency_s"] for p in curve], marker=".", label=arm)
        axis.axhline(100, color="grey", lw=0.8, ls="--")
        ratio = published.THROUGHPUT_RATIO[model]
        axis.set(title=f"{model} (published: {ratio}x)", xlabel="output tokens/s (simulated)", ylim=(0, 400))
        axis.grid(True, alpha=0.2)
    row[0].set_ylabel("ms for each output token")
    row[0].legend(fontsize="small")
    return figure


def _ttft(points: Points) -> Any:
    """Figure 11: P95 TTFT by clients, with the published values as lines."""
    models = [m for m in published.TTFT_P95_S if _shared(points, m, "vllm")]
    if not models:
        return None
    figure, (row,) = new_figure(1, len(models), (5 * len(models), 3.8))
    for axis, model in zip(row, models, strict=True):
        for i, arm in enumerate(ARMS):
            curve = _shared(points, model, arm)
            if curve:
                axis.plot(
                    [p["clients"] for p in curve],
                    [p["ttft_p95_s"] for p in curve],
                    marker=".",
                    color=f"C{i}",
                    label=arm,
                )
            if (said := published.TTFT_P95_S[model].get(arm)) is not None:
                axis.axhline(said, color=f"C{i}", lw=0.6, ls=":")
        axis.set(
            title=f"{model} (dotted: published, 1 request/s)", xlabel="clients", ylabel="P95 TTFT, s", yscale="log"
        )
        axis.grid(True, alpha=0.2)
    row[0].legend(fontsize="small")
    return figure


def _tpot(points: Points) -> Any:
    """Figure 13: the distribution of TPOT at one load."""
    figure, ((axis,),) = new_figure(1, 1, (5, 3.8))
    for arm in ARMS:
        for point in _shared(points, DETAIL, arm):
            if point["clients"] == 60:
                axis.plot([1e3 * t for t in point["tpot_percentiles_s"]], [p / 100 for p in range(101)], label=arm)
    if not axis.lines:
        return None
    for name, seconds in published.TPOT_P99_S.items():
        axis.axvline(1e3 * seconds, color="grey", lw=0.6, ls=":")
        axis.text(1e3 * seconds, 0.05, f"{name} P99, published", rotation=90, fontsize="x-small")
    axis.set(title=f"{DETAIL}, 60 clients (simulated)", xlabel="TPOT of a request, ms", ylabel="share of requests")
    axis.set_xscale("log")
    axis.legend(fontsize="small")
    return figure


def _tiers(points: Points) -> Any:
    """Figures 15 and 16: where prompt tokens were found, by clients."""
    works = [w for w in ("sharegpt", "humaneval", "alpaca") if _of(points, model=DETAIL, arm="flashgen", work=w)]
    if not works:
        return None
    figure, (row,) = new_figure(1, len(works), (4.2 * len(works), 3.6))
    for axis, work in zip(row, works, strict=True):
        curve = _of(points, model=DETAIL, arm="flashgen", work=work, host_gb=HOST_GB)
        clients = [p["clients"] for p in curve]
        shares = [[p[f"{tier}_hit_share"] for p in curve] for tier in ("device", "host", "disk")]
        axis.stackplot(clients, *shares, labels=("GPU", "host", "SSD"), alpha=0.8)
        axis.set(title=f"{DETAIL}, {work} (simulated)", xlabel="clients", ylim=(0, 1))
    row[0].set_ylabel("share of prompt tokens found")
    row[0].legend(fontsize="small", loc="upper right")
    return figure


def _utilisation(points: Points) -> Any:
    """Figures 7 and 18: KV memory over time, memory being short."""
    busiest = {arm: _shared(points, DETAIL, arm)[-1:] for arm in ("vllm", "flashgen", "jserve")}
    shown = {arm: found[0] for arm, found in busiest.items() if found}
    if not shown:
        return None
    figure, (row,) = new_figure(1, len(shown), (4.2 * len(shown), 3.2))
    for axis, (arm, point) in zip(row, shown.items(), strict=True):
        times, held, cached = zip(*point["utilisation"], strict=True)
        axis.stackplot(times, held, cached, labels=("occupied", "cached"), alpha=0.8)
        title = f"{arm}, {point['clients']} clients: {100 * point['kv_utilisation_when_short']:.0f} % occupied"
        axis.set(title=title, xlabel="s", ylim=(0, 1))
    row[0].legend(fontsize="small", loc="lower right")
    return figure


def _host_size(points: Points) -> Any:
    """168, 224 and 280 GB of host memory."""
    figure, (row,) = new_figure(1, 2, (8, 3.4))
    for arm in ("flashgen", "jserve"):
        curve = sorted(_of(points, model=DETAIL, arm=arm, work="sharegpt", clients=60), key=lambda p: p["host_gb"])
        for axis, name in zip(row, ("ttft_p95_s", "host_hit_share"), strict=True):
            axis.plot([p["host_gb"] for p in curve], [p[name] for p in curve], marker="o", label=arm)
    if len(row[0].lines[0].get_xdata()) < 2:
        return None
    row[0].set(
        title=f"{DETAIL}, 60 clients (simulated)", xlabel="host memory, GB", ylabel="P95 TTFT, s", ylim=(0, None)
    )
    row[1].set(xlabel="host memory, GB", ylabel="share of prompt tokens found on the host", ylim=(0, 1))
    row[0].legend(fontsize="small")
    return figure


def _long_context(points: Points) -> Any:
    """Figure 19: KV utilisation and throughput by the longest prompt."""
    figure, (row,) = new_figure(1, 2, (8, 3.4))
    for i, arm in enumerate(("vllm", "flashgen-sched", "jserve")):
        curve = sorted(_of(points, arm=arm, work="long"), key=lambda p: p["max_tokens"])
        lengths = [p["max_tokens"] * 16 // 17 // 1024 for p in curve]
        row[0].plot(lengths, [p["kv_utilisation_when_short"] for p in curve], marker="o", color=f"C{i}", label=arm)
        row[1].plot(lengths, [p["output_tokens_per_s"] for p in curve], marker="o", color=f"C{i}", label=arm)
        said = published.LONG_CONTEXT.get(arm, {})
        row[0].plot([n // 1024 for n in said], list(said.values()), ls=":", color=f"C{i}")
    if not row[0].lines[0].get_xdata().size:
        return None
    row[0].set(title="dotted: published", xlabel="longest prompt, k tokens", ylabel="share of KV memory occupied")
    row[1].set(title="simulated", xlabel="longest prompt, k tokens", ylabel="output tokens/s")
    row[0].legend(fontsize="small")
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.flashgen_figures", description=draw_all.__doc__)
    parser.add_argument("points", type=Path, help="what bench.flashgen --points has written")
    parser.add_argument("directory", type=Path, help="where to draw")
    args = parser.parse_args()
    for path in draw_all(read_points(args.points), args.directory):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
