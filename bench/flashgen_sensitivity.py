"""`python -m bench.flashgen_sensitivity`: how firm the evaluation's ratios are: the same on other assumptions.

Everything is simulated, as in `bench.flashgen`, whose headline ratios (output tokens/s at 100 ms a token) are told here
with one number of the hardware profile or of the scheduler moved at a time (`flashgen_runs.VARIATIONS`), with smaller
blocks, and with people whose think times are drawn at random, which makes their return harder to foresee.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bench import report
from bench.flashgen import BLOCK, START
from bench.flashgen_runs import (
    COMPARED,
    MODELS,
    POLICY_VARIATIONS,
    VARIATIONS,
    WARM_UP_TURNS,
    Run,
    around_bound,
    ratios_of,
    run_all,
)
from jserve.console import RichProgress
from jserve.errors import JserveError

NOTHING = "nothing"


def main() -> int:
    args = _arguments()
    console = report.console(args)
    base = Run("opt-30b", "jserve", 60, args.calls, WARM_UP_TURNS, args.seed, args.block_size)
    moved = {name: replace(base, variation=name) for name in (*VARIATIONS, *POLICY_VARIATIONS)}
    moved |= {"blocks of 16": replace(base, block_tokens=16), "random think times": replace(base, work="restless")}
    cases = {NOTHING: base} | {n: of for n, of in moved.items() if args.only is None or n in args.only}
    starts = [start for of in cases.values() for m in args.models for start in _starts(of, m)]
    try:
        points = around_bound(starts, lambda runs: run_all(runs, args.jobs, RichProgress(), args.points))
    except JserveError as error:
        print(f"bench.flashgen_sensitivity: {error}", file=sys.stderr)
        return 2
    ratios = {name: ratios_of([p for p in points if _same_case(p.run, of)]) for name, of in cases.items()}
    metrics = _metrics(ratios)
    rows: list[list[object]] = [
        [name, *(f"{said[m, over]:.2f}x" for m in args.models for over in COMPARED)] for name, said in ratios.items()
    ]
    columns = ["moved", *(f"{m} / {over}" for m in args.models for over in COMPARED)]
    title = "output tokens/s of jserve at 100 ms a token, over vllm and over flashgen (simulated)"
    console.width = max(console.width, 160)
    console.print(report.table(title, columns, rows))
    config = {"simulated": True, "calls": base.calls, "block_size": base.block_tokens}
    report.emit(report.Result("flashgen_sensitivity", metrics, config | {"points": len(points)}, args.seed), args)
    return 0


def _starts(of: Run, model: str) -> list[Run]:
    return [replace(of, model=model, arm=arm, clients=loads[model]) for arm, loads in START.items()]


def _same_case(run: Run, of: Run) -> bool:
    return replace(run, model=of.model, arm=of.arm, clients=of.clients) == of


def _metrics(ratios: Mapping[str, Mapping[tuple[str, str], float]]) -> dict[str, float]:
    return {
        f"{model.replace('-', '_')}_over_{over}, {case}": ratio
        for case, said in ratios.items()
        for (model, over), ratio in said.items()
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.flashgen_sensitivity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="*", metavar="CASE", help="of the moved assumptions (all)")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(MODELS),
        default=["opt-30b", "llama-2-70b"],
        metavar="M",
        help=f"of {', '.join(MODELS)} (opt-30b, llama-2-70b: two devices each, much KV and little)",
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
