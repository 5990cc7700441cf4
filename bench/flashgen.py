"""`python -m bench.flashgen`: the seeds' evaluation, simulated: FlashGen's machine, models, clients and figures.

Every number is simulated: production engine, scheduler and cache over timed doors (`jserve.simulation`), on profiles
whose every number has its source. `--short` takes under a minute and gives the headline metrics alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import flashgen_published as published
from bench import report
from bench.flashgen_runs import (
    BOUND_S,
    MODELS,
    WARM_UP_TURNS,
    Point,
    Run,
    around_bound,
    at_equal_loads,
    ratios_of,
    run_all,
    throughput_at,
    with_clients,
)
from jserve.console import RichProgress
from jserve.errors import JserveError
from jserve.simulation.arms import ABLATIONS, ARMS

CLIENTS = {
    "opt-13b": (40, 50, 60, 70, 80, 90, 100),
    "opt-30b": (40, 50, 60, 70, 80, 90, 100, 110),
    "llama-2-13b": (40, 50, 60, 70, 80, 90, 100),
    "llama-2-70b": (10, 20, 30, 40, 50),
}
SEEDS, SHORT_SEEDS = 3, 1
"""Over which the ratios are averaged. A seed draws the order of the chats, which matters: around the bound the latency
rises steeply."""
CALLS, SHORT_CALLS = 1000, 600
"""Measured requests of a point."""
BLOCK, SHORT_BLOCK = 64, 128
"""Tokens in a block: large ones are quick to simulate."""
START: Mapping[str, Mapping[str, int]] = {
    "vllm": {"opt-13b": 50, "opt-30b": 50, "llama-2-13b": 50, "llama-2-70b": 20},
    "flashgen": {"opt-13b": 80, "opt-30b": 70, "llama-2-13b": 80, "llama-2-70b": 30},
    "jserve": {"opt-13b": 100, "opt-30b": 100, "llama-2-13b": 100, "llama-2-70b": 50},
}
"""By arm and model: the load from which the bound is looked for. A bad guess costs time, no more."""
SHORT_SHARED = (60, 100)
"""Loads of the metrics that compare arms under one load: where the vLLM arm's P95 TTFT is nearest to the published one
with so few requests and so large blocks (10 s with 55 clients, 21 with 60), and where memory is short."""
ABLATION_CLIENTS = {
    "opt-13b": (60, 80, 100),
    "opt-30b": (60, 80, 100),
    "llama-2-13b": (60, 80, 100),
    "llama-2-70b": (30, 40, 50),
}
HOST_GB = (168.0, 224.0, 280.0)
LONG = (16384, 24576, 32768)
TIER_CLIENTS = {"humaneval": (20, 60, 100, 140), "alpaca": (60, 140, 220, 300)}
PROMPT_CLIENTS = (10, 20, 30, 40)
"""Few enough that the prompt phase is not queueing."""
DETAIL, DETAIL_CLIENTS = "opt-30b", 60
"""The model and load of the figures about one point."""


def main() -> int:
    args = _arguments()
    console = report.console(args)
    try:
        return _evaluate(args, console)
    except JserveError as error:
        print(f"bench.flashgen: {error}", file=sys.stderr)
        return 2


def _evaluate(args: argparse.Namespace, console: Console) -> int:
    base = Run(
        "opt-30b",
        "jserve",
        60,
        calls=args.calls or (SHORT_CALLS if args.short else CALLS),
        warm_up_turns=WARM_UP_TURNS,
        seed=args.seed,
        block_tokens=args.block_size or (SHORT_BLOCK if args.short else BLOCK),
    )

    def simulate_all(runs: list[Run]) -> Mapping[Run, Point]:
        return run_all(runs, args.jobs, RichProgress(), args.points)

    if args.short:
        points = _short_points(base, args.models, simulate_all)
    else:
        plan = dict.fromkeys(_plan(base, args.models))
        done = simulate_all(list(plan))
        points = [done[run] for run in plan]
    curves = _curves(points, base)
    seeds = range(args.seed + 1, args.seed + (args.seeds or (SHORT_SEEDS if args.short else SEEDS)))
    others = around_bound([start for seed in seeds for start in _starts(base, args.models, seed)], simulate_all)
    ratios = {args.seed: ratios_of([point for curve in curves.values() for point in curve])}
    ratios |= {seed: ratios_of([point for point in others if point.run.seed == seed]) for seed in seeds}
    metrics = _metrics(curves, list(ratios.values()))
    _print(console, curves, metrics)
    console.print(_seeds_table(ratios))
    config = {"simulated": True, "short": args.short, "calls": base.calls, "block_size": base.block_tokens}
    if args.figures is not None:
        from bench.flashgen_figures import draw_all

        for path in draw_all(points, args.figures):
            report.note(console, f"drawn {path}")
    config |= {"seeds": len(ratios), "points": len(points) + len(others)}
    report.emit(report.Result("flashgen", metrics, config, args.seed), args)
    return 0


# --- what is run


def _plan(base: Run, models: Sequence[str]) -> list[Run]:
    runs = [run for m in models for a in ARMS for run in with_clients(_of(base, m, a), CLIENTS[m])]
    runs += [
        run
        for m in models
        if m in published.PROMPT_PHASE_SPEEDUP
        for a in ("cachedattention", "flashgen")
        for run in with_clients(_of(base, m, a), PROMPT_CLIENTS)
    ]
    runs += [run for m in models for a in ABLATIONS for run in with_clients(_of(base, m, a), ABLATION_CLIENTS[m])]
    if DETAIL in models:
        runs += [
            _of(base, DETAIL, a, clients=DETAIL_CLIENTS, host_gb=gb) for a in ("flashgen", "jserve") for gb in HOST_GB
        ]
        runs += [_long(base, a, longest) for a in ("vllm", "flashgen-sched", "jserve") for longest in LONG]
        runs += [
            run
            for work, clients in TIER_CLIENTS.items()
            for run in with_clients(_of(base, DETAIL, "flashgen", work=work), clients)
        ]
    return runs


def _short_points(
    base: Run, models: Sequence[str], simulate_all: Callable[[list[Run]], Mapping[Run, Point]]
) -> list[Point]:
    """Enough for every metric."""
    points = {point.run: point for point in around_bound(_starts(base, models, base.seed), simulate_all)}
    if DETAIL in models:
        shared = [run for a in ("vllm", "jserve") for run in with_clients(_of(base, DETAIL, a), SHORT_SHARED)]
        points |= {run: point for run, point in simulate_all(shared).items() if run in shared}
    return list(points.values())


def _starts(base: Run, models: Sequence[str], seed: int) -> list[Run]:
    return [_of(base, m, a, clients=of[m], seed=seed) for a, of in START.items() for m in models]


def _of(base: Run, model: str, arm: str, **changes: Any) -> Run:
    return replace(base, model=model, arm=arm, **changes)


def _long(base: Run, arm: str, longest: int) -> Run:
    """Figure 19: single requests, as many clients as keep the device short of memory."""
    return _of(base, DETAIL, arm, work="long", max_tokens=longest * 17 // 16, clients=40, calls=300, warm_up_turns=2)


# --- what comes of it


Curves = Mapping[tuple[str, str], list[Point]]


def _curves(points: Sequence[Point], base: Run) -> dict[tuple[str, str], list[Point]]:
    """The ShareGPT points of each model and arm, by clients."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for point in sorted(points, key=lambda point: point.run.clients):
        run = point.run
        if run.work == "sharegpt" and run.host_gb == base.host_gb and not run.variation:
            curves.setdefault((run.model, run.arm), []).append(point)
    return curves


def _metrics(curves: Curves, ratios: Sequence[Mapping[tuple[str, str], float]]) -> dict[str, float]:
    """`ratios`: `ratios_of` each seed."""
    metrics: dict[str, float] = {}
    models = [m for m in MODELS if (m, "jserve") in curves]
    for model in models:
        name = (
            model.replace("-", "", 1)
            if model.startswith("opt")
            else model.replace("llama-2", "llama2").replace("-", "_")
        )
        drawn = [said[model, "vllm"] for said in ratios]
        metrics[f"{name}_throughput_ratio"] = mean(drawn)
        metrics |= {f"{name}_throughput_ratio_least": min(drawn), f"{name}_throughput_ratio_most": max(drawn)}
    metrics["jserve_over_flashgen_min"] = min(mean(said[m, "flashgen"] for said in ratios) for m in models)
    metrics["jserve_over_flashgen_min_of_seeds"] = min(said[m, "flashgen"] for said in ratios for m in models)
    if DETAIL in models:
        clients = matched_clients(curves)
        vllm, ours = (_at(curves[DETAIL, a], clients) for a in ("vllm", "jserve"))
        metrics["opt30b_p95_ttft_ratio"] = vllm["ttft_p95_s"] / ours["ttft_p95_s"]
        metrics["opt30b_p95_ttft_clients"] = clients
        busiest = max(_shared_clients(curves))  # where memory is short in the jserve arm too
        vllm, ours = (_at(curves[DETAIL, a], busiest) for a in ("vllm", "jserve"))
        metrics["opt30b_kv_utilisation"] = ours["kv_utilisation_when_short"]
        metrics["opt30b_batch_ratio"] = ours["mean_batch"] / vllm["mean_batch"]
        metrics["opt30b_kv_clients"] = busiest
    return metrics


def matched_clients(curves: Curves) -> int:
    """The load of figure 11: where the vLLM arm's P95 TTFT is nearest to the published one's."""
    wanted_s = published.TTFT_P95_S[DETAIL]["vllm"]
    shared = [p for p in curves[DETAIL, "vllm"] if p.run.clients in _shared_clients(curves)]
    return min(shared, key=lambda p: abs(p.numbers["ttft_p95_s"] - wanted_s)).run.clients


def _shared_clients(curves: Curves) -> set[int]:
    """The loads under which both arms have run."""
    ours, theirs = ({p.run.clients for p in curves[DETAIL, a]} for a in ("jserve", "vllm"))
    return ours & theirs


def _at(curve: Sequence[Point], clients: int) -> Mapping[str, float]:
    return next(point.numbers for point in curve if point.run.clients == clients)


# --- what is shown


def _print(console: Console, curves: Curves, metrics: Mapping[str, float]) -> None:
    models = [m for m in MODELS if (m, "jserve") in curves]
    arms = [a for a in ARMS if (models[0], a) in curves]
    rows: list[list[object]] = []
    for a in arms:
        rates = [throughput_at(curves[m, a]) for m in models]
        over = [rate / throughput_at(curves[m, "vllm"]) for m, rate in zip(models, rates, strict=True)]
        rows.append([a, *(f"{rate:.0f} ({x:.2f}x)" for rate, x in zip(rates, over, strict=True))])
    rows.append(["FlashGen, published", *(f"{published.THROUGHPUT_RATIO[m]:.2f}x" for m in models)])
    title = f"output tokens/s at {1e3 * BOUND_S:.0f} ms a token (simulated), and over the vllm arm"
    console.print(report.table(title, ["", *models], rows))
    if (models[0], next(iter(ABLATIONS))) in curves:
        equal = {m: at_equal_loads({a: curves[m, a] for a in ("jserve", *ABLATIONS)}) for m in models}
        rows = [[a, *(f"{throughput_at(equal[m][a]):.0f}" for m in models)] for a in ("jserve", *ABLATIONS)]
        console.print(report.table("one choice taken back, from equal loads (simulated)", ["", *models], rows))
    if DETAIL in models:
        clients = matched_clients(curves)
        rows = []
        for a in arms:
            curve = [p for p in curves[DETAIL, a] if p.run.clients == clients]
            if curve:
                n = curve[0].numbers
                said = published.TTFT_P95_S[DETAIL].get(a)
                shares = [n[f"{tier}_hit_share"] for tier in ("device", "host", "disk")]
                rows.append(
                    [
                        a,
                        n["output_tokens_per_s"],
                        1e3 * n["normalised_latency_s"],
                        n["ttft_p95_s"],
                        "" if said is None else said,
                        1e3 * n["tpot_p99_s"],
                        " ".join(f"{share:.2f}" for share in shares),
                        n["mean_batch"],
                        n["kv_utilisation"],
                    ]
                )
        title = (
            f"{DETAIL}, {clients} clients (simulated): where the vllm arm's P95 TTFT is nearest to the published one"
        )
        columns = [
            "",
            "tok/s",
            "ms/token",
            "P95 TTFT s",
            "published",
            "P99 TPOT ms",
            "hits gpu host ssd",
            "batch",
            "KV used",
        ]
        console.print(report.table(title, columns, rows))
    if rows := _prompt_phases(curves):
        columns = ["", *(f"{n} clients" for n in PROMPT_CLIENTS), "published"]
        title = "mean TTFT of cachedattention over that of flashgen (simulated); in brackets: found on the GPU"
        console.print(report.table(title, columns, rows))
    console.print(report.table("metrics (simulated)", ["", ""], [[k, v] for k, v in metrics.items()]))


def _seeds_table(ratios: Mapping[int, Mapping[tuple[str, str], float]]) -> Table:
    pairs = list(next(iter(ratios.values())))
    rows: list[list[object]] = [[f"seed {s}", *(f"{said[p]:.2f}x" for p in pairs)] for s, said in ratios.items()]
    rows.append(["mean", *(f"{mean(said[p] for said in ratios.values()):.2f}x" for p in pairs)])
    title = "output tokens/s of jserve at 100 ms a token, over the other arms (simulated)"
    return report.table(title, ["", *(f"{model} / {over}" for model, over in pairs)], rows)


def _prompt_phases(curves: Curves) -> list[list[object]]:
    """Figure 12: prompts wait less where the GPU still has their history, which CachedAttention never does."""
    rows: list[list[object]] = []
    for model, said in published.PROMPT_PHASE_SPEEDUP.items():
        both = {
            a: {p.run.clients: p.numbers for p in curves.get((model, a), ())} for a in ("cachedattention", "flashgen")
        }
        theirs, ours = both["cachedattention"], both["flashgen"]
        if set(PROMPT_CLIENTS) <= theirs.keys() & ours.keys():
            cells = [
                f"{theirs[n]['ttft_mean_s'] / ours[n]['ttft_mean_s']:.2f}x ({ours[n]['device_hit_share']:.2f})"
                for n in PROMPT_CLIENTS
            ]
            rows.append([model, *cells, f"{said:.2f}x"])
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.flashgen", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--short", action="store_true", help="the headline metrics alone, in under a minute")
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="M", help=f"of {', '.join(MODELS)}"
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help=f"average the ratios over so many, from --seed on ({SEEDS}; --short: 1)"
    )
    parser.add_argument(
        "--calls", type=int, metavar="N", help=f"measured requests of a point ({CALLS}; --short: {SHORT_CALLS})"
    )
    parser.add_argument(
        "--block-size", type=int, metavar="N", help=f"tokens in a block ({BLOCK}; --short: {SHORT_BLOCK})"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (one a core)"
    )
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the figures there (needs matplotlib)")
    parser.add_argument(
        "--points", type=Path, metavar="FILE", help="keep every point there, and take from there what it holds"
    )
    report.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
