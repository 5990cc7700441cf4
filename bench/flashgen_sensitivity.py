"""`python -m bench.flashgen_sensitivity`: how firm the evaluation's ratios are: other seeds, and other assumptions.

Everything is simulated, as in `bench.flashgen`. First each headline ratio (output tokens/s at 100 ms a token) over
seeds, which draw the order of the chats. Then the same with one number of the hardware profile moved at a time
(`flashgen_runs.VARIATIONS`), with smaller blocks, and with people whose think times are drawn at random, which makes
their return harder to foresee.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from bench import report
from bench.flashgen import BLOCK, SHORT_FROM
from bench.flashgen_runs import MODELS, VARIATIONS, Point, Run, around_bound, run_all, throughput_at
from jserve.console import RichProgress
from jserve.errors import JserveError

MOVED = ("opt-30b", "llama-2-70b")
"""The models whose assumptions are moved: two devices each, much KV and little."""
OVER = ("vllm", "flashgen")


def main() -> int:
    args = _arguments()
    console = report.console(args)
    base = Run(
        "opt-30b", "jserve", 60, calls=args.calls, warm_up_turns=10, seed=args.seed, block_tokens=args.block_size
    )
    seeds = {f"seed {n}": replace(base, seed=n) for n in range(args.seed, args.seed + args.seeds)}
    moved = {name: replace(base, variation=name) for name in VARIATIONS}
    moved |= {"blocks of 16": replace(base, block_tokens=16), "random think times": replace(base, work="restless")}
    cases = {name: (of, tuple(args.models)) for name, of in seeds.items()}
    shown = [m for m in MOVED if m in args.models]
    cases |= {name: (of, tuple(shown)) for name, of in moved.items() if args.only is None or name in args.only}
    starts = [start for of, models in cases.values() for m in models for start in _starts(of, m)]
    try:
        points = around_bound(starts, lambda runs: run_all(runs, args.jobs, RichProgress(), args.points))
    except JserveError as error:
        print(f"bench.flashgen_sensitivity: {error}", file=sys.stderr)
        return 2
    ratios = {name: ratios_of([p for p in points if _same_case(p.run, of)]) for name, (of, _) in cases.items()}
    metrics = _metrics(ratios, list(seeds))
    rows: list[list[object]] = [
        [name, *(f"{said[m, over]:.2f}x" if (m, over) in said else "" for m in args.models for over in OVER)]
        for name, said in ratios.items()
    ]
    columns = ["", *(f"{m} / {over}" for m in args.models for over in OVER)]
    title = "output tokens/s of jserve at 100 ms a token, over vllm and over flashgen (simulated)"
    console.width = max(console.width, 160)
    console.print(report.table(title, columns, rows))
    console.print(report.table("over the seeds", ["", ""], [[k, v] for k, v in metrics.items() if "_seeds_" in k]))
    config = {"simulated": True, "calls": base.calls, "block_size": base.block_tokens, "seeds": args.seeds}
    report.emit(report.Result("flashgen_sensitivity", metrics, config | {"points": len(points)}, args.seed), args)
    return 0


def _starts(of: Run, model: str) -> list[Run]:
    return [replace(of, model=model, arm=arm, clients=loads[model]) for arm, loads in SHORT_FROM.items()]


def _same_case(run: Run, of: Run) -> bool:
    return replace(run, model=of.model, arm=of.arm, clients=of.clients) == of


def ratios_of(points: Sequence[Point]) -> dict[tuple[str, str], float]:
    """By model and compared arm."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        curves.setdefault((point.run.model, point.run.arm), []).append(point)
    at = {key: throughput_at(curve) for key, curve in curves.items()}
    models = {model for model, _ in at}
    return {(model, over): at[model, "jserve"] / at[model, over] for model in models for over in OVER}


def _metrics(ratios: Mapping[str, Mapping[tuple[str, str], float]], seeds: Sequence[str]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for model in {model: None for model, _ in ratios[seeds[0]]}:
        for over in OVER:
            name = f"{model.replace('-', '_')}_over_{over}"
            drawn = [ratios[seed][model, over] for seed in seeds]
            metrics |= {f"{name}_seeds_mean": mean(drawn), f"{name}_seeds_least": min(drawn)}
            metrics[f"{name}_seeds_most"] = max(drawn)
            for case, said in ratios.items():
                if case not in seeds and (model, over) in said:
                    metrics[f"{name}, {case}"] = said[model, over]
    return metrics


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.flashgen_sensitivity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="from --seed on (3)")
    parser.add_argument("--only", nargs="*", metavar="CASE", help="of the moved assumptions; none: the seeds alone")
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="M", help=f"of {', '.join(MODELS)}"
    )
    parser.add_argument("--block-size", type=int, default=BLOCK, metavar="N", help=f"tokens in a block ({BLOCK})")
    parser.add_argument("--calls", type=int, default=600, metavar="N", help="measured requests of a point (600)")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (one a core)"
    )
    parser.add_argument("--points", type=Path, metavar="FILE", help="keep every point there, and take them from there")
    report.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
