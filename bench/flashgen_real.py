"""`python -m bench.flashgen_real`: FlashGen's arms on the real engine of this machine, each beside its simulation.

The work is the evaluation's (`bench.flashgen`), made small: ShareGPT's turn lengths scaled down, a closed loop, think
times by the token, a device pool that holds a few histories, a host tier that holds a few more, and a disk. One runner
serves every arm in turn; an arm is a configuration of engine, scheduler and cache, as in the simulation, and starts
with empty tiers. Copies are measured before the arms, and steps on other chats before and after them; from these costs
the simulator predicts each arm on the same work. Equal prompts must have had the same greedy answer in every arm.

On a GPU, a 13B shape with random weights:
`python -m bench.flashgen_real --model-shape llama-2-13b --scale 1 --max-tokens 4096 --clients 32 --device-tokens 16384
--host-tokens 65536 --token-budget 2048 --think-ms 20 --calls 400`.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, median

import jax
from rich.console import Console

from bench import profiling, report
from bench.flashgen_runs import numbers_of
from bench.noise import Noise
from bench.shapes import SHAPES
from bench.tier_engines import make_runner
from bench.workloads import lengths
from jserve import calibrate
from jserve.cache.cost import CostModel
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.console import RichProgress
from jserve.doors import SystemClock
from jserve.engine import Engine
from jserve.errors import JserveError
from jserve.progress import Progress
from jserve.runner import Runner
from jserve.simulation.arms import ARMS, arm
from jserve.simulation.doors import Spread
from jserve.simulation.fitting import RecordingExecutor, StepSample, fit_steps
from jserve.simulation.gauges import Gauges, Observed
from jserve.simulation.playing import Span, play
from jserve.simulation.simulator import System, simulate
from jserve.simulation.workload import Call, Session, Users, Workload, closed_loop
from jserve.tiers import build_cache, open_disk
from jserve.transfer import JaxTransfer

TOLD = {
    "output_tokens_per_s": ("tok/s", 1.0),
    "normalised_latency_s": ("ms/tok", 1e3),
    "ttft_p50_s": ("TTFT50 s", 1.0),
    "ttft_p95_s": ("TTFT95 s", 1.0),
    "tpot_p99_s": ("TPOT99 ms", 1e3),
    "mean_batch": ("batch", 1.0),
    "kv_utilisation": ("KV", 1.0),
}
"""The columns, with what a number is multiplied by for people."""
HITS = ("device_hit_share", "host_hit_share", "disk_hit_share")
SIMULATIONS = 5
"""Of each arm, in the mean: single ones depend on which steps happen to be slow, as a single real run does."""
APART = 0.1
"""Arms whose results differ by less than this share have no order that a second run would confirm."""
Answers = dict[tuple[str, int], tuple[list[int], list[int]]]
"""By session and turn: the prompt, and what was said."""


class Lent(RecordingExecutor):
    """A runner that is lent to one engine after the other: closing an engine leaves it alone."""

    def close(self) -> None:
        """The lender closes it."""


class Heard(Users):
    """Clients who remember what they asked and what they were told."""

    def __init__(self, work: Workload, vocab_size: int) -> None:
        super().__init__(work, vocab_size)
        self.answers: Answers = {}

    def answered(self, call: Call, player: object, token_ids: Sequence[int], now_s: float) -> None:
        if len(token_ids) == call.output_tokens:  # it was not refused
            self.answers[call.session.id, call.turn] = call.token_ids, list(token_ids)
        super().answered(call, player, token_ids, now_s)


@dataclass(frozen=True)
class Served:
    """One arm on the real engine."""

    name: str
    numbers: Mapping[str, float]
    answers: Answers
    others_cores: float


@dataclass(frozen=True)
class Pair:
    """One arm in both worlds."""

    name: str
    real: Mapping[str, float]
    simulated: Mapping[str, float]
    spread: Mapping[str, float]
    """Half of what lies between the least and the most that single simulations say, as a share of their mean: a real
    run is one of them, and may be as far from it."""
    answers: Answers
    others_cores: float


@dataclass(frozen=True)
class Stage:
    """What all arms share."""

    args: argparse.Namespace
    runner: Runner
    cost: CostModel
    spread: Spread
    work: Workload
    directory: Path
    progress: Progress
    steps: Sequence[StepSample] = ()
    """What the costs of steps are fitted to."""

    def config(self, name: str) -> EngineConfig:
        """The arm's settings, on this machine's sizes."""
        args, runner = self.args, self.runner
        host_blocks = args.host_tokens // runner.info.block_size
        sizes = CacheConfig(
            block_size=runner.info.block_size,
            device_blocks=runner.info.device_blocks,
            host_gib=(host_blocks + 0.5) * runner.block_bytes / 2**30,
            disk_dir=str(self.directory / "disk"),
        )
        caching, scheduling = arm(name).policies(sizes, runner.config.sched)
        return replace(runner.config, cache=caching, sched=scheduling)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console, progress = report.console(args), RichProgress()
    try:
        with _stage(args, progress) as stage:
            served = [_serve(stage, name) for name in args.arms]
            stage = _with_steps(stage, args.seed + 2)  # the machine may be another than it was before the arms
            pairs = [_pair(stage, arm) for arm in served]
            about = _about(stage)
    except (JserveError, OSError) as error:
        print(f"bench.flashgen_real: {error}", file=sys.stderr)
        return 2
    metrics = _metrics(pairs)
    _print(console, pairs, about, metrics)
    report.emit(report.Result("flashgen_real", metrics, about, args.seed), args)
    return 0 if metrics["same_tokens"] == 1 else 1


# --- what is served


@contextmanager
def _stage(args: argparse.Namespace, progress: Progress) -> Iterator[Stage]:
    """A runner, its costs measured, and a place on disk for as long as that lasts."""
    block = args.block_size or (8 if jax.default_backend() == "cpu" else 16)
    config = EngineConfig(
        model=args.model,
        max_model_len=args.max_tokens,
        cache=CacheConfig(block_size=block, device_blocks=-(-args.device_tokens // block), host_gib=1.0),
        sched=SchedConfig(
            max_running=args.max_running, token_budget=args.token_budget, max_waiting=100_000, admission="queue"
        ),
        runner=RunnerConfig(**profiling.of(args)),
    )
    runner = make_runner(config, args.model_shape, progress)
    directory = Path(tempfile.mkdtemp(prefix="jserve-arms-", dir=args.directory))
    try:
        cost = _links(config, runner, directory, progress)
        stage = Stage(args, runner, cost, Spread((1.0,), (1.0,)), _work(args, args.seed), directory, progress)
        yield _with_steps(stage, args.seed + 1)
    finally:
        runner.close()
        shutil.rmtree(directory, ignore_errors=True)


def _links(config: EngineConfig, runner: Runner, directory: Path, progress: Progress) -> CostModel:
    """Copies between device, host and disk, each alone."""
    progress.note("measuring copies")
    tiered = replace(config, cache=replace(config.cache, disk_dir=str(directory / "measured")))
    transfer = JaxTransfer(runner, open_disk(tiered, runner))
    try:
        return calibrate.measure(tiered, runner, transfer, progress)
    finally:
        transfer.close()


def _with_steps(stage: Stage, seed: int) -> Stage:
    """Steps as they come when other chats are served, to many and to few, beside those that are known. It also warms
    everything up."""
    args, work = stage.args, _work(stage.args, seed)
    late = replace(work, name="other chats, to measure steps", sessions=tuple(map(entered_late, work.sessions)))
    steps = list(stage.steps)
    for clients in (args.clients, -(-args.clients // 4)):
        calls = max(8, args.calls * clients // (2 * args.clients))
        with _engine(stage, "flashgen-cache") as (engine, executor):
            play(engine, closed_loop(late, clients), span=Span(0, calls), progress=stage.progress)
        steps += executor.samples
    prefill, decode, spread = fit_steps(steps)
    return replace(stage, cost=replace(stage.cost, prefill=prefill, decode=decode), spread=spread, steps=steps)


def entered_late(session: Session) -> Session:
    """The chat from its middle on, with as many tokens as were said before in its first prompt: so that few calls have
    the long histories and the long chunks, and the short ones after them, which all come up in the end."""
    middle = len(session.turns) // 2
    said = sum(turn.prompt_tokens + turn.output_tokens for turn in session.turns[:middle])
    first, *later = session.turns[middle:]
    start, *rest = first.prompt
    first = replace(first, prompt=(replace(start, tokens=said + start.tokens), *rest))
    return replace(session, turns=(first, *later))


def _work(args: argparse.Namespace, seed: int) -> Workload:
    chats = lengths.sharegpt(sys.maxsize, seed)
    return closed_loop(lengths.smaller(chats, args.scale, args.max_tokens, args.think_ms / 1e3), args.clients)


@contextmanager
def _engine(stage: Stage, name: str) -> Iterator[tuple[Engine, Lent]]:
    """The arm's engine, its tiers empty."""
    config, runner, clock = stage.config(name), stage.runner, SystemClock()
    if config.cache.disk_dir is not None:
        shutil.rmtree(config.cache.disk_dir, ignore_errors=True)
    executor = Lent(runner, clock)
    cache = build_cache(config, runner, stage.progress, copy.deepcopy(stage.cost))
    engine = Engine(config, runner.info, executor, clock, cache)
    try:
        yield engine, executor
    finally:
        engine.close()


def _serve(stage: Stage, name: str) -> Served:
    noise = Noise()
    span, work = _played(stage, name)
    with _engine(stage, name) as (engine, executor):
        gauges, users = Gauges(engine), Heard(work, engine.info.vocab_size)
        executor.on_end = lambda plan, seconds: gauges.see(plan, seconds, ended=True)
        played = play(engine, work, span=span, progress=stage.progress, users=users)
        others_cores = noise.others_cores()
    return Served(name, numbers_of(Observed(played, gauges)), users.answers, others_cores)


def _pair(stage: Stage, real: Served) -> Pair:
    """The arm in the simulator, too."""
    span, work = _played(stage, real.name)
    systems = [_described(stage, real.name, n) for n in range(SIMULATIONS)]
    runs = [numbers_of(simulate(system, work, span=span, most_steps=1)) for system in systems]
    simulated = {key: mean(run[key] for run in runs) for key in runs[0]}
    spread = {key: _spread([run[key] for run in runs]) for key in simulated}
    return Pair(real.name, real.numbers, simulated, spread, real.answers, real.others_cores)


def _spread(values: Sequence[float]) -> float:
    middle = mean(values)
    return (max(values) - min(values)) / 2 / middle if middle else 0.0


def _played(stage: Stage, name: str) -> tuple[Span, Workload]:
    return Span(stage.args.warm_up, stage.args.calls), replace(stage.work, name=name)


def _described(stage: Stage, name: str, nth: int) -> System:
    """The same engine for the simulator; each draws other times from the same spread."""
    info = stage.runner.info
    return System(
        stage.cost,
        info.device_blocks,
        info.model,
        info.backend,
        stage.config(name),
        info.max_model_len,
        info.weight_bytes,
        info.token_budget,
        spread=replace(stage.spread, seed=nth),
    )


# --- what comes of it


def same_answers(heard: Sequence[Answers]) -> tuple[int, int]:
    """How many equal prompts had the same answer, and how many were asked at all, of all pairs of arms."""
    same = asked = 0
    for one, other in combinations(heard, 2):
        for key in one.keys() & other.keys():
            (prompt, said), (their_prompt, they_said) = one[key], other[key]
            if prompt == their_prompt:
                asked += 1
                same += said == they_said
    return same, asked


def same_order(pairs: Sequence[Pair], name: str) -> tuple[int, int]:
    """Of the pairs of arms that are clearly apart in the real run: how many are in the same order in the simulation."""
    same = apart = 0
    for one, other in combinations(pairs, 2):
        a, b = one.real[name], other.real[name]
        if abs(a - b) > APART * max(a, b):
            apart += 1
            same += (a > b) == (one.simulated[name] > other.simulated[name])
    return same, apart


def _metrics(pairs: Sequence[Pair]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for pair in pairs:
        short = pair.name.replace("-", "_")
        for name in (*TOLD, *HITS, "preemptions"):
            metrics[f"{short}_{name}"] = pair.real[name]
            metrics[f"{short}_simulated_{name}"] = pair.simulated[name]
        metrics[f"{short}_others_cores"] = pair.others_cores
    named = {pair.name: pair for pair in pairs}
    for over in ("vllm", "flashgen"):
        if {over, "jserve"} <= named.keys():
            ours, theirs, rate = named["jserve"], named[over], "output_tokens_per_s"
            metrics[f"jserve_over_{over}"] = ours.real[rate] / theirs.real[rate]
            metrics[f"jserve_over_{over}_simulated"] = ours.simulated[rate] / theirs.simulated[rate]
    for name in TOLD:
        metrics[f"{name}_error"] = median(abs(p.simulated[name] / p.real[name] - 1) for p in pairs)
        metrics[f"{name}_spread"] = median(p.spread[name] for p in pairs)
    same, asked = same_answers([pair.answers for pair in pairs])
    metrics |= {"same_tokens": int(same == asked), "equal_prompts": asked}
    for name in ("output_tokens_per_s", "normalised_latency_s", "ttft_p95_s"):
        same, apart = same_order(pairs, name)
        metrics |= {f"{name}_pairs_apart": apart, f"{name}_pairs_in_order": same}
    return metrics


def _about(stage: Stage) -> dict[str, object]:
    args, info, cost = stage.args, stage.runner.info, stage.cost
    names = ("clients", "calls", "warm_up", "scale", "max_tokens", "device_tokens", "host_tokens", "think_ms")
    return {
        "model": info.model,
        "dtype": info.dtype,
        "backend": info.backend,
        "block_size": info.block_size,
        "work": stage.work.name,
        **{name: getattr(args, name) for name in names},
        "cost": cost.to_dict(),
        "compiles_after_warmup": stage.runner.compiles_after_warmup,
    }


def _print(console: Console, pairs: Sequence[Pair], about: Mapping[str, object], metrics: Mapping[str, float]) -> None:
    columns = ["", *(title for title, _ in TOLD.values()), "hits"]
    rows: list[list[object]] = []
    for pair in pairs:
        for label, numbers in ((pair.name, pair.real), ("  simulated", pair.simulated)):
            told = [f"{numbers[name] * factor:.3g}" for name, (_, factor) in TOLD.items()]
            rows.append([label, *told, "/".join(f"{100 * numbers[name]:.0f}" for name in HITS)])
    title = f"{about['model']} on {about['backend']}, {about['clients']} clients; hits: % on device/host/disk"
    console.print(report.table(title, columns, rows))
    errors = [
        [title, *(f"{100 * metrics[f'{name}_{what}']:.1f} %" for what in ("error", "spread"))]
        for name, (title, _) in TOLD.items()
    ]
    title = "the simulation's error, and by how much single simulations differ; median of the arms"
    console.print(report.table(title, ["", "error", "+-"], errors))
    for name, what in (
        ("output_tokens_per_s", "throughput"),
        ("normalised_latency_s", "latency"),
        ("ttft_p95_s", "P95 TTFT"),
    ):
        same, apart = (metrics[f"{name}_pairs_{end}"] for end in ("in_order", "apart"))
        report.note(
            console,
            f"{what}: of {apart:.0f} pairs of arms more than {100 * APART:.0f} % apart, {same:.0f} in the same order",
        )
    said = "the same greedy answers" if metrics["same_tokens"] else "NOT the same greedy answers"
    report.note(console, f"{said} in every arm, {metrics['equal_prompts']:.0f} comparisons of equal prompts")
    busiest = max(pair.others_cores for pair in pairs)
    report.note(console, f"other processes took up to {busiest:.2f} cores meanwhile")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.flashgen_real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="the embedded default if left out")
    parser.add_argument("--model-shape", choices=SHAPES, help="random weights of this shape instead of a model")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="all six")
    for flag, default, what in (
        ("--clients", 16, "of the closed loop"),
        ("--calls", 80, "measured requests of an arm"),
        ("--warm-up", 3, "turns of each client that do not count"),
        ("--max-tokens", 1024, "context to which chats are cut"),
        ("--device-tokens", 1600, "of the KV pool"),
        ("--host-tokens", 2400, "of the host tier"),
        ("--max-running", 16, "requests in a batch"),
        ("--token-budget", 256, "tokens of a step"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{what} ({default})")
    parser.add_argument("--scale", type=float, default=0.1, metavar="F", help="turn lengths times this (0.1)")
    parser.add_argument("--think-ms", type=float, default=80, metavar="MS", help="think time a token (80; paper: 200)")
    parser.add_argument("--block-size", type=int, help="tokens (default: the engine's)")
    parser.add_argument(
        "--directory", type=Path, help="for the disk tier: a folder of its own is made there, and removed"
    )
    profiling.add_argument(parser, skip=500)
    report.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
