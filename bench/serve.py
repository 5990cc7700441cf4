"""`python -m bench.serve`: the speed of jserve, closed-loop, on real multi-turn dialogues, through its gRPC door.

Starts `jserve serve` twice (the second start has a warm compile cache: that one is `ready_s`), or takes a running
server by --target. Then, for each --concurrency, it plays the dialogues, and sends the same later prompts again under
fresh cache salts: what recomputing their history costs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bench import profiling, report
from bench.closed_loop import Run, percentile, play, replay, warm_up
from bench.noise import Noise
from bench.servers import Server, ServerError, grpc_ready, no_survivors
from bench.systems import Jserve
from bench.transports import ChatError, JserveTransport
from bench.workloads.dialogues import WorkloadError, load, part
from bench.workloads.streams import NAMED, stream, worded
from jserve.errors import ConfigError
from jserve.simulation.workload import Session, Workload, compressed

DIALOGUES_AT_LEAST = 8
MEMORY_UNKNOWN = "needs a server that this benchmark started, whose GetStats tells weight_bytes and pool_bytes"


@dataclass(frozen=True)
class Level:
    """What was measured with one number of users."""

    users: int
    played: Run
    recomputed: Run
    """The later turns of `played`, nothing of them cached."""
    host_step_ms: float


def main() -> int:
    with no_survivors():
        return _serve(_arguments())


def _serve(args: argparse.Namespace) -> int:
    console = report.console(args)
    try:
        workload = _work(args)
        if args.target:
            metrics = _measure_target(args.target, workload, args, console)
        else:
            metrics = _measure_own(workload, args, console)
    except (ChatError, ConfigError, ServerError, WorkloadError) as error:
        print(f"bench.serve: {error}", file=sys.stderr)
        return 1
    missing = {} if "resident_over_weights_and_pool" in metrics else {"resident_over_weights_and_pool": MEMORY_UNKNOWN}
    config = {
        "dialogues": workload.name,
        "compress": args.compress,
        "concurrency": args.concurrency,
        "dialogues_per_user": args.dialogues_per_user,
        "max_tokens": args.max_tokens,
        "target": args.target,
        "flags": _flags(args),
    }
    for name, reason in missing.items():
        report.note(console, f"not measured: {name}: {reason}")
    report.emit(report.Result("serve", metrics, config, args.seed, missing=missing), args)
    return 0


def _work(args: argparse.Namespace) -> Workload:
    """Dialogues with words, or another stream, which tells its own think times and lengths of replies."""
    if args.work is None:
        return load(args.dialogues, args.seed)
    return compressed(stream(args.work, args.context, args.seed), args.compress)


def _measure_own(workload: Workload, args: argparse.Namespace, console: Console) -> dict[str, float]:
    """Start a server, twice, and measure the second one."""
    system = Jserve(_flags(args))
    with tempfile.TemporaryDirectory() as logs:
        with console.status("starting jserve, to fill its compile cache"):
            first = system.start(Path(logs), max(args.concurrency))
            first.stop()
        with console.status("starting jserve again"):
            server = system.start(Path(logs), max(args.concurrency))
        try:
            metrics = _measure_target(system.target, workload, args, console, server)
        finally:
            server.stop()
    if args.profile:
        report.note(console, profiling.told(args))
    report.note(console, f"ready in {first.ready_s:.1f} s, and in {server.ready_s:.1f} s with a warm compile cache")
    return {**metrics, "ready_first_s": first.ready_s, "ready_s": server.ready_s}


def _measure_target(
    target: str,
    workload: Workload,
    args: argparse.Namespace,
    console: Console,
    server: Server | None = None,
) -> dict[str, float]:
    """Measure a server that runs. Of one that we started, its memory and what others took of the CPU, too."""
    if not grpc_ready(target)():
        raise ServerError(f"no jserve serves on {target}: start one with `jserve serve`, or leave --target out")
    noise = Noise(server) if server else None
    with Progress(console=console, transient=True) as bars:
        levels, stats = asyncio.run(_levels(target, workload, args, bars))
    _print(levels, workload, console)
    metrics = {**_metrics(levels[0]), "compiles_after_warmup": stats["compiles_after_warmup"]}
    if len(levels) > 1:
        metrics |= {f"{name}_c{level.users}": value for level in levels for name, value in _metrics(level).items()}
    if noise:
        metrics["others_cores"] = noise.others_cores()
        report.note(console, f"processes outside took {metrics['others_cores']:.2f} cores")
    if server and {"weight_bytes", "pool_bytes"} <= stats.keys():
        resident = server.resident_bytes()
        metrics["resident_bytes"] = resident
        metrics["resident_over_weights_and_pool"] = resident / (stats["weight_bytes"] + stats["pool_bytes"])
    return metrics


async def _levels(
    target: str, workload: Workload, args: argparse.Namespace, bars: Progress
) -> tuple[list[Level], Mapping[str, float]]:
    """Every level with dialogues of its own; the engine's counters at the end."""
    transport = JserveTransport(target)
    levels: list[Level] = []
    used = 0
    try:
        for users in args.concurrency:
            count = max(DIALOGUES_AT_LEAST, users * args.dialogues_per_user)
            dialogues = tuple(map(worded, part(workload, used, count)))
            levels.append(await _level(transport, dialogues, users, args, bars))
            used += count
        return levels, await transport.stats()
    finally:
        await transport.close()


async def _level(
    transport: JserveTransport, dialogues: tuple[Session, ...], users: int, args: argparse.Namespace, bars: Progress
) -> Level:
    turns = sum(len(d.turns) for d in dialogues)
    bar = bars.add_task(f"{users} users", total=2 * turns - len(dialogues))
    await warm_up(transport, users)
    loop = None if any(d.start_s for d in dialogues) else users
    played = await play(transport, dialogues, loop, args.max_tokens, lambda: bars.advance(bar))
    stats = await transport.stats()
    later = [turn for turn in played.turns if turn.index > 0]
    salt = f"recompute {args.seed} {users} {played.start_s}"
    recomputed = await replay(transport, later, users, args.max_tokens, salt, lambda: bars.advance(bar))
    return Level(users, played, recomputed, stats["host_step_ms_p50"])


def _metrics(level: Level) -> dict[str, float]:
    """Without those of later turns, if there are none."""
    run = level.played
    metrics = {"output_tokens_per_s": run.output_tokens_per_s}
    first, later = ([turn.ttft_s for turn in run.measured(later=is_later)] for is_later in (False, True))
    again = [turn.ttft_s for turn in level.recomputed.measured()]
    tpot = [turn.tpot_s for turn in run.measured()]
    metrics["ttft_first_p50_s"] = percentile(first, 50)
    if later and again:
        metrics |= {
            "ttft_later_p50_s": percentile(later, 50),
            "ttft_later_p95_s": percentile(later, 95),
            "ttft_recompute_p50_s": percentile(again, 50),
            "ttft_later_over_recompute": percentile(later, 50) / percentile(again, 50),
        }
    return metrics | {
        "tpot_p50_s": percentile(tpot, 50),
        "tpot_p95_s": percentile(tpot, 95),
        "cached_share": run.cached_share or 0.0,
        "host_step_ms_p50": level.host_step_ms,
    }


def _print(levels: list[Level], workload: Workload, console: Console) -> None:
    names = list(_metrics(levels[0]))
    rows = [[name, *(_metrics(level).get(name, "") for level in levels)] for name in names]
    turns = sum(len(level.played.turns) for level in levels)
    columns = ["", *(f"{level.users} users" for level in levels)]
    console.print(report.table(f"jserve, {turns} turns of {workload.name}", columns, rows))


def _flags(args: argparse.Namespace) -> list[str]:
    """As users start it: what they leave out has its default, the KV pool too."""
    return [*(["--model", args.model] if args.model else []), *args.serve_flags, *profiling.flags_of(args)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--target", metavar="HOST:PORT", help="a running jserve server; starts one if left out")
    parser.add_argument("--model", help="for the started server; the embedded default if left out")
    parser.add_argument("--dialogues", type=Path, metavar="FILE", help="jsonl or jsonl.gz of dialogues")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 8, 16], metavar="C", help="users, one level each (1 8 16)"
    )
    parser.add_argument("--dialogues-per-user", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="of each reply, exactly (default 64; with --work what it says)"
    )
    parser.add_argument(
        "--work",
        metavar="NAME|FILE",
        help=f"instead of dialogues, with think times and lengths of its own: {', '.join(NAMED)}, or a trace. One that "
        "tells times of arrival is played by these, so many sessions as the users would have had",
    )
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="with --work: longest chat (2048)")
    parser.add_argument("--compress", type=float, default=1.0, metavar="F", help="with --work: F times as fast (1)")
    parser.add_argument("serve_flags", nargs="*", metavar="-- FLAG", help="more flags of `jserve serve`")
    profiling.add_argument(parser)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.work is None and args.max_tokens is None:
        args.max_tokens = 64
    if args.target and args.profile:
        parser.error("--profile needs a server of its own: leave --target out, or start yours with --profile-dir")
    return args


if __name__ == "__main__":
    sys.exit(main())
