"""`python -m bench.recompute_vs_swap`: is it cheaper to compute a preempted request's KV again, or to copy it away?

With --sim: the sweeps of the SC24 poster "Uncover the Overhead and Resource Usage for Handling KV Cache Overflow in LLM
Inference", beside its published seconds, with `auto` (the choice per victim by the cost model) as a third curve. The
poster's swaps are out and in; one way only is what remains where full blocks have been written through to the host
(FlashGen). All of it is simulated: formulas of a fit to its A100 (`published.json` names the sources), and for the
sweeps of many requests the production scheduler and cache over simulated time.

Without --sim: the same sweeps on the real engine, on this machine; scaled down where that is a CPU (some minutes,
or with --short one to two). Every way must give the same answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from bench import profiling, report
from bench.recompute_vs_swap.sweeps import Sweep, table
from bench.shapes import SHAPES
from bench.timing import stoppable
from jserve.console import RichProgress
from jserve.errors import JserveError

PROFILE_SKIP = 16
"""Steps of a crowd before its trace: then the first give way."""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.sim and args.profile is not None:
        _parser().error("--profile traces the real engine: leave --sim out")
    screen = report.console(args)
    if not screen.is_terminal:
        screen.width = 200  # a log is read with all its columns
    try:
        with stoppable():
            (_simulate if args.sim else _measure)(args, screen)
    except KeyboardInterrupt:
        print("bench.recompute_vs_swap: stopped", file=sys.stderr)
        return 1
    except (JserveError, OSError) as error:
        print(f"bench.recompute_vs_swap: {error}", file=sys.stderr)
        return 2
    return 0


def _simulate(args: argparse.Namespace, screen: Console) -> None:
    from bench.recompute_vs_swap.figures import draw
    from bench.recompute_vs_swap.simulated import study

    found = study(args.seed, RichProgress(), short=args.short)
    for sweep in found.sweeps.values():
        _show(sweep, screen)
    result = report.Result("recompute_vs_swap", found.metrics(), {"simulated": True, **asdict(found)}, args.seed)
    report.emit(result, args)  # before the figures: they would make the commit a dirty one
    if args.figures is not None:
        for path in draw(result.document(), args.figures):
            report.note(screen, f"drew {path}")


def _measure(args: argparse.Namespace, screen: Console) -> None:
    import jax

    from bench.recompute_vs_swap.real import CPU, GPU, measure

    sizes = CPU if jax.default_backend() == "cpu" else GPU
    given = {"shape": args.shape, "evicted": args.lengths, "counts": args.requests, "turns": args.turns}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    if args.short:
        sizes = sizes.short()
    found = measure(sizes, args.model, args.seed, RichProgress(), profiling.of(args))
    for sweep in found.sweeps.values():
        _show(sweep, screen)
    for line in found.notes:
        report.note(screen, line)
    report.note(
        screen, f"Others took {found.others_cores:.2f} cores meanwhile: near 0 is a measurement, more is a hint."
    )
    said = {"sizes": asdict(sizes), **asdict(found), "cost": found.cost.to_dict()}
    result = report.Result("recompute_vs_swap", found.metrics(), {"simulated": False, **said}, args.seed)
    report.emit(result, args)
    if args.figures is not None:
        from bench.recompute_vs_swap.figures import draw_real

        simulated = json.loads((report.RESULTS / "recompute_vs_swap-sim.json").read_text())
        for path in draw_real(result.document(), simulated, args.figures):
            report.note(screen, f"drew {path}")
    if not found.same_tokens:
        raise JserveError("the ways gave different answers")


def _show(sweep: Sweep, screen: Console) -> None:
    screen.print(table(sweep))
    for line in sweep.notes:
        report.note(screen, f"  {line}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.recompute_vs_swap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sim", action="store_true", help="the poster's sweeps, simulated (no model is loaded)")
    parser.add_argument("--short", action="store_true", help="the first and the last point of each sweep")
    parser.add_argument(
        "--figures",
        type=Path,
        nargs="?",
        const=report.RESULTS,
        metavar="DIRECTORY",
        help="draw figures (needs matplotlib; default: bench/results)",
    )
    real = parser.add_argument_group("without --sim (defaults: what suits the device)")
    real.add_argument("--model", help="a directory, GGUF file or hub id, instead of --shape")
    real.add_argument("--shape", choices=SHAPES, help="a shape with random weights")
    real.add_argument("--lengths", type=_numbers, metavar="N,N,...", help="A: tokens of the prompts")
    real.add_argument("--requests", type=_numbers, metavar="N,N,...", help="D: requests at once, as 32,64,128")
    real.add_argument("--turns", type=int, metavar="N", help="A and B: times that each is measured")
    profiling.add_argument(real, skip=PROFILE_SKIP)
    report.add_arguments(parser)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them, such as 32,64") from None


if __name__ == "__main__":
    sys.exit(main())
