"""`python -m bench.peers`: jserve and its peers on the same work, in the same run, one after the other.

Every system is a server of its own, and gets the same weights, dialogues, client loop, cores, context, and about the
same KV pool.
While one is measured the others are stopped (SIGSTOP). Rounds are interleaved (A B C, then C B A), each with dialogues
of its own; ratios are ours over theirs, per round, and the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bench import peer_weights, profiling, report
from bench.closed_loop import Run, play, warm_up
from bench.contest import Contest
from bench.noise import Noise
from bench.peer_systems import PEERS, LlamaCpp, Transformers, Vllm
from bench.servers import Server, ServerError, no_survivors
from bench.systems import Jserve, Missing, System, bench_flags
from bench.transports import ChatError
from bench.workloads.dialogues import WorkloadError, load, part
from jserve.errors import JserveError
from jserve.simulation.workload import Session, Workload

DIALOGUES_AT_LEAST = 4
PEER_NAMES = ("vllm", "transformers", "llama_cpp_f32", "llama_cpp_q4_1")


def main() -> int:
    with no_survivors():
        return _compare(_arguments())


def _compare(args: argparse.Namespace) -> int:
    console = report.console(args)
    try:
        workload = load(args.dialogues, args.seed)
        contest = _prepared(args, console)
        try:
            _measure(contest, workload, args, PEERS / "logs", console)
        finally:
            contest.stop()
    except (ChatError, ServerError, WorkloadError, JserveError) as error:
        print(f"bench.peers: {error}", file=sys.stderr)
        return 1
    if args.profile:
        report.note(console, profiling.told(args))
    contest.show(args.concurrency, args.repeats, console)
    config = {
        "dialogues": workload.name,
        "concurrency": args.concurrency,
        "repeats": args.repeats,
        "dialogues_per_user": args.dialogues_per_user,
        "max_tokens": args.max_tokens,
        "systems": {system.name: system.note for system in contest.systems},
    }
    metrics = contest.metrics(args.concurrency, args.repeats)
    report.emit(report.Result("peers", metrics, config, args.seed, contest.versions, contest.missing), args)
    return 0


def _prepared(args: argparse.Namespace, console: Console) -> Contest:
    """Install what is asked for and not there yet; who cannot be had is missing, and why."""
    model = peer_weights.source(args.model)
    weights = PEERS / "models"
    contest = Contest([Jserve([*bench_flags(str(model)), *profiling.flags_of(args)])])
    for name in args.peers:
        try:
            system = _peer(name, model, weights, console)
            contest.versions.update({f"{name}.{package}": v for package, v in system.prepare().items()})
            contest.systems.append(system)
        except Missing as reason:
            contest.missing[name] = str(reason)
    return contest


def _peer(name: str, model: Path, weights: Path, console: Console) -> System:
    say = functools.partial(report.note, console)
    if name == "vllm":
        return Vllm(peer_weights.hf_directory(model, weights), say)
    if name == "transformers":
        return Transformers(peer_weights.hf_directory(model, weights), say)
    if model.suffix != ".gguf":
        raise Missing(f"llama.cpp reads GGUF files, and the model is {model}")
    if name == "llama_cpp_f32":
        return LlamaCpp(peer_weights.float32_gguf(model, weights), "f32", say)
    return LlamaCpp(model, "q4_1", say)


def _measure(contest: Contest, workload: Workload, args: argparse.Namespace, logs: Path, console: Console) -> None:
    """All rounds. A peer that fails is dropped; jserve failing ends the run."""
    used = 0
    with Progress(console=console, transient=True) as bars:
        bar = bars.add_task("measuring", total=args.repeats * len(args.concurrency) * len(contest.systems))
        for round_ in range(args.repeats):
            for users in args.concurrency:
                count = max(DIALOGUES_AT_LEAST, users * args.dialogues_per_user)
                dialogues = part(workload, used, count)
                used += count
                for system in contest.systems[:: -1 if round_ % 2 else 1]:
                    bars.update(bar, description=f"round {round_ + 1}, {users} users, {system.name}")
                    try:
                        run = _cell(contest, system, dialogues, users, args, logs)
                    except (ChatError, ServerError) as error:
                        if isinstance(system, Jserve):
                            raise
                        contest.drop(system, error)
                        continue
                    finally:
                        bars.advance(bar)
                    contest.runs[system.name, users, round_] = run
                    speed = f"{run.output_tokens_per_s:.1f} tokens/s"
                    noise = f"others took {contest.others_cores[-1]:.2f} cores"
                    report.note(console, f"round {round_ + 1}, {users} users: {system.name} {speed} ({noise})")


def _cell(
    contest: Contest, system: System, dialogues: Sequence[Session], users: int, args: argparse.Namespace, logs: Path
) -> Run:
    """One system, one number of users, one round: alone on the machine."""
    server = contest.servers.get(system.name)
    if server is None:
        server = contest.servers[system.name] = system.start(logs, max(args.concurrency))
    server.resume()
    try:
        run, others_cores = asyncio.run(_played(system, server, dialogues, users, args.max_tokens))
    finally:
        server.pause()
    contest.others_cores.append(others_cores)
    return run


async def _played(
    system: System, server: Server, dialogues: Sequence[Session], users: int, max_tokens: int
) -> tuple[Run, float]:
    transport = system.transport()
    try:
        await warm_up(transport, users)
        noise = Noise(server)
        return await play(transport, dialogues, users, max_tokens), noise.others_cores()
    finally:
        await transport.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="jserve and its peers on the same work.")
    parser.add_argument(
        "--peers", nargs="*", choices=PEER_NAMES, default=list(PEER_NAMES), help=f"default: {' '.join(PEER_NAMES)}"
    )
    parser.add_argument("--model", help="a GGUF file or model directory; the embedded default if left out")
    parser.add_argument("--dialogues", type=Path, metavar="FILE", help="jsonl or jsonl.gz of dialogues")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16], metavar="C", help="default 1 8 16")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="interleaved rounds (default 3)")
    parser.add_argument("--dialogues-per-user", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of each reply, exactly (default 64)")
    profiling.add_argument(parser)
    report.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
