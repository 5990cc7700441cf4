"""`python -m bench.kernels`: how near jserve's kernels come to what the GPU can do, and to other kernels, in one run.

The ceilings are measured in the same run: a large copy for bytes, a large bfloat16 product for operations. A share is
the least bytes (or operations) that a case needs, over its time, over the ceiling. The claims' metrics are the worst of
their cases: decodes of at least 16 rows and 2k tokens, prefills of 4k tokens with heads of 128.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from bench import profiling, report, roofline
from bench.attention_cases import AttentionCase
from bench.kernel_sweep import FULL, SHORT, TOY, Measured, Sweep
from bench.timing import copy_bandwidth, matmul_rate, stoppable
from jserve.console import RichProgress

BUDGET_S = 240.0
FROM_DECODE = ("decode_step_over_floor", "idle_share")


@dataclass(frozen=True)
class Ceilings:
    """Of this machine, in this run."""

    bytes_per_s: float
    flops_per_s: float


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not args.toy:
        print(
            f"bench.kernels: JAX sees no NVIDIA GPU here, only {jax.default_backend()}: run it on a machine with one, "
            "or with --toy to see the command work on small sizes",
            file=sys.stderr,
        )
        return 2
    start_s = time.perf_counter()
    sizes = TOY if args.toy else SHORT if args.short else FULL
    console = report.console(args)
    ceilings = Ceilings(copy_bandwidth(sizes.copy_bytes), matmul_rate(sizes.matmul))
    report.note(
        console,
        f"ceilings: copy {ceilings.bytes_per_s / 1e9:.0f} GB/s (read and written), "
        f"bfloat16 product {ceilings.flops_per_s / 1e12:.1f} TFLOP/s",
    )
    sweep = Sweep("pallas" if on_gpu else "xla", args.seed, start_s + args.budget_s)
    try:
        with stoppable(), profiling.traced(args, partial(report.note, console)):
            sweep.run(sizes, RichProgress())
    except KeyboardInterrupt:
        report.note(console, "stopped: this is what was measured until then")
    rows = [case_row(m, ceilings) for m in sweep.measured]
    metrics, missing = metrics_of(sweep, ceilings)
    decode, reason = _from_decode(args.decode_json)
    metrics |= decode
    missing |= dict.fromkeys(set(FROM_DECODE) - set(decode), reason)
    config = {
        "sizes": "toy" if args.toy else "short" if args.short else "full",
        "backend": f"{jax.default_backend()}/{sweep.backend}",
        "copy_bytes_per_s": ceilings.bytes_per_s,
        "matmul_flops_per_s": ceilings.flops_per_s,
        "seconds": round(time.perf_counter() - start_s, 1),
        "cases": rows,
        "block_copies": [
            {"case": name, "way": way, "share": value / ceilings.bytes_per_s} for name, way, value in sweep.copies
        ],
    }
    _show(console, rows, sweep, ceilings, missing)
    result = report.Result("kernels", metrics, config, args.seed, missing=missing)
    plot = args.plot or (report.path_of(result, args).with_suffix(".png") if args.save is not None else None)
    if plot is not None and (problem := roofline.draw(config, plot)):
        missing["roofline plot"] = problem
        report.note(console, f"no roofline plot: {problem}")
    report.emit(result, args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short", action="store_true", help="a few cases, about a minute")
    size.add_argument("--toy", action="store_true", help="tiny cases, on any device: numbers mean nothing")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="start no case after so long (240)")
    parser.add_argument("--decode-json", type=Path, help="a result of bench.decode --shape llama-2-13b to take up")
    parser.add_argument("--plot", type=Path, help="draw the roofline here (with --save: beside the JSON)")
    profiling.add_directory(parser)
    report.add_arguments(parser)
    return parser


def case_row(measured: Measured, ceilings: Ceilings) -> dict[str, Any]:
    case, seconds = measured.case, measured.seconds
    return {
        "case": str(case),
        "phase": case.phase,
        "by": measured.name,
        "us": seconds * 1e6,
        "gb_per_s": case.least_bytes() / seconds / 1e9,
        "tflop_per_s": case.flops() / seconds / 1e12,
        "flop_per_byte": case.flops() / case.least_bytes(),
        "bandwidth_share": case.least_bytes() / seconds / ceilings.bytes_per_s,
        "flops_share": case.flops() / seconds / ceilings.flops_per_s,
        "error": measured.error,
    }


def metrics_of(sweep: Sweep, ceilings: Ceilings) -> tuple[dict[str, float], dict[str, str]]:
    """The issue's metrics, each the worst of its cases; and those that there is nothing to make of."""
    ours = {m.case: m.seconds for m in sweep.measured if m.name == f"jserve_{sweep.backend}"}
    decode = {case: s for case, s in ours.items() if claimed_decode(case)}
    prefill = {case: s for case, s in ours.items() if claimed_prefill(case)}
    found = {
        "decode_bandwidth_share": [c.least_bytes() / s / ceilings.bytes_per_s for c, s in decode.items()],
        "decode_vs_best_peer": _against_peers(decode, sweep),
        "prefill_flops_share": [c.flops() / s / ceilings.flops_per_s for c, s in prefill.items()],
        "prefill_vs_best_peer": _against_peers(prefill, sweep),
        "gather_bandwidth_share": [value / ceilings.bytes_per_s for _, _, value in sweep.copies],
    }
    missing = {name: "no case of it was measured" for name, values in found.items() if not values}
    return {name: min(values) for name, values in found.items() if values}, sweep.missing | missing


def claimed_decode(case: AttentionCase) -> bool:
    return case.phase == "decode" and case.batch >= 16 and case.context >= 2048 and not case.kv_dtype


def claimed_prefill(case: AttentionCase) -> bool:
    return case.queries >= 4096 and case.head_dim == 128


def _against_peers(ours: Mapping[AttentionCase, float], sweep: Sweep) -> list[float]:
    """The fastest peer's time over ours, for each case that has a peer."""
    ratios = []
    for case, seconds in ours.items():
        theirs = [m.seconds for m in sweep.measured if m.case == case and m.name != f"jserve_{sweep.backend}"]
        ratios += [min(theirs) / seconds] if theirs else []
    return ratios


def _from_decode(path: Path | None) -> tuple[dict[str, float], str]:
    """What bench.decode has measured on the whole step, or why there is none."""
    if path is None:
        return {}, "measured by `python -m bench.decode --shape llama-2-13b`: give its JSON by --decode-json"
    try:
        metrics = json.loads(path.read_text())["metrics"]
    except (OSError, ValueError, KeyError) as error:
        return {}, f"{path} is no result of bench.decode ({type(error).__name__})"
    return {name: metrics[name] for name in FROM_DECODE if name in metrics}, f"not in {path}"


def _show(
    console: Any, rows: Sequence[Mapping[str, Any]], sweep: Sweep, ceilings: Ceilings, missing: Mapping[str, str]
) -> None:
    if not console.is_terminal:
        console.width = 160
    names = ("case", "by", "us", "gb_per_s", "bandwidth_share", "tflop_per_s", "flops_share", "error")
    console.print(report.table("attention", names, [tuple(row[name] for name in names) for row in rows]))
    copies = [(name, way, value / 1e9, value / ceilings.bytes_per_s) for name, way, value in sweep.copies]
    console.print(report.table("block copies", ("case", "way", "GB/s", "share of copy"), copies))
    for name, reason in missing.items():
        report.note(console, f"missing: {name}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
