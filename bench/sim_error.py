"""`python -m bench.sim_error`: how far the simulator is from the real engine, on this machine, with a real model.

An engine in this process serves chats and notes what each step held and took; from that the steps' costs are fitted,
and how much single steps differ from them. Other chats are served by the real engine, and by the simulator with those
costs. Chats to fit and chats to compare alternate, and each work is simulated with what was fitted right before it and
right after, for the machine's own speed drifts by more than the simulator is off. Throughput and percentiles are those
of all compared calls together, for in a queue the latest of few calls is a matter of luck. Each work is simulated
several times, with other draws from the steps' spread.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rich.console import Console

from bench import profiling, report
from bench.noise import Noise
from jserve.cache.cost import CostModel, DecodeCost, LinkCost, PrefillCost
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.console import RichProgress
from jserve.engine import Engine
from jserve.errors import JserveError
from jserve.simulation.fitting import RecordingExecutor, StepSample, fit_steps
from jserve.simulation.playing import Played, play
from jserve.simulation.simulator import System, simulate
from jserve.simulation.summary import measured, percentile, summarise
from jserve.simulation.workload import Workload, chat_session, closed_loop, contents

COMPARED = {
    "throughput_error": "output_tokens_per_s",
    "ttft_p50_error": "ttft_p50_s",
    "ttft_p95_error": "ttft_p95_s",
    "tpot_p50_error": "tpot_p50_s",
}


SIMULATIONS = 5
"""Of each work."""


@dataclass(frozen=True)
class Compared:
    """What both worlds made of the same works."""

    prefill: PrefillCost
    decode: DecodeCost
    """Fitted to all that was fitted to."""
    real: Sequence[Played]
    simulated: Sequence[Sequence[Played]]
    """Of each work."""

    def error(self, name: str) -> float:
        """Relative, of all works together; above 0 where the simulation says more."""
        return together([run for runs in self.simulated for run in runs])[name] / together(self.real)[name] - 1


class CpuClock:
    """Counts what this process takes of its cores: what else runs on a shared machine hardly shows."""

    def __init__(self) -> None:
        self._cores = len(os.sched_getaffinity(0))
        self._waited_s = 0.0

    def now(self) -> float:
        return time.process_time() / self._cores + self._waited_s

    def wait(self, seconds: float) -> None:
        """Nothing else would happen meanwhile."""
        self._waited_s += seconds


def main() -> int:
    args = _arguments()
    console = report.console(args)
    noise = Noise()
    try:
        done = _compared(args)
    except JserveError as error:
        print(f"bench.sim_error: {error}", file=sys.stderr)
        return 2
    real, said = together(done.real), together([run for runs in done.simulated for run in runs])
    metrics = {metric: abs(done.error(name)) for metric, name in COMPARED.items()}
    rows: list[list[object]] = []
    for name in COMPARED.values():
        singly = (
            together(runs)[name] / together([one])[name] - 1
            for one, runs in zip(done.real, done.simulated, strict=True)
        )
        each = " ".join(f"{100 * error:+.1f}" for error in singly)
        rows.append([name, real[name], said[name], f"{100 * done.error(name):+.1f} %", each])
    columns = ["", "real", "simulated", "error", "each work, %"]
    console.print(report.table("the simulator beside the real engine, on the same work", columns, rows))
    metrics["others_cores"] = noise.others_cores()
    _note_fit(console, done, metrics["others_cores"])
    names = ("clients", "sessions", "rounds", "model", "cpu_clock")
    config = {name: getattr(args, name) for name in names} | {"calls": sum(len(run.calls) for run in done.real)}
    report.emit(report.Result("sim_error", metrics, config, args.seed), args)
    return 0


def _compared(args: argparse.Namespace) -> Compared:
    progress = RichProgress()
    config = EngineConfig(
        model=args.model,
        cache=CacheConfig(device_blocks=args.device_blocks),
        sched=SchedConfig(max_running=max(8, args.clients)),
        max_model_len=2048,
        runner=RunnerConfig(**profiling.of(args)),
    )
    engine = Engine.from_config(config, progress)
    if args.cpu_clock:
        engine.clock = CpuClock()
    recorder = RecordingExecutor(engine.executor, engine.clock)
    engine.executor = recorder
    fitted: list[list[StepSample]] = []
    works, real = [], []
    try:
        play(engine, chats(4, args.clients, args.seed), progress=progress)  # first calls cost extra
        for n in range(args.rounds + 1):
            recorder.samples = []
            fitting = chats(max(4, args.sessions // 2), args.clients, args.seed + 2 * n + 1)
            play(engine, replace(fitting, name="to fit"), progress=progress)
            fitted.append(recorder.samples)
            if n < args.rounds:
                works.append(replace(chats(args.sessions, args.clients, args.seed + 2 * n + 2), name="to compare"))
                real.append(play(engine, works[-1], progress=progress))
        systems = [_system(engine, [*before, *after]) for before, after in pairwise(fitted)]
    finally:
        engine.close()
    prefill, decode, _ = fit_steps([sample for samples in fitted for sample in samples])
    return Compared(prefill, decode, real, [simulated(*pair) for pair in zip(systems, works, strict=True)])


def simulated(described: System, work: Workload) -> list[Played]:
    """Some times, each with other draws from the spread."""
    assert described.spread is not None
    spreads = [replace(described.spread, seed=seed) for seed in range(SIMULATIONS)]
    return [simulate(replace(described, spread=spread), work, most_steps=1).played for spread in spreads]


def together(runs: Sequence[Played]) -> dict[str, float]:
    """The compared numbers of all calls of these runs."""
    each = [summarise(run) for run in runs]
    calls = [call for run in runs for call in measured(run) if not call.refused]
    ttfts, tpots = [call.ttft_s for call in calls], [call.tpot_s for call in calls if call.output_tokens > 1]
    return {
        "output_tokens_per_s": sum(s.output_tokens_per_s * s.seconds for s in each) / sum(s.seconds for s in each),
        "ttft_p50_s": percentile(ttfts, 50),
        "ttft_p95_s": percentile(ttfts, 95),
        "tpot_p50_s": percentile(tpots, 50),
    }


def _system(engine: Engine, samples: Sequence[StepSample]) -> System:
    """The same engine, with steps fitted to these: it has no tiers, so that copies do not count."""
    info = engine.info
    prefill, decode, spread = fit_steps(samples)
    free = LinkCost(1e12)
    cost = CostModel(prefill, decode, free, free, free, free, info.block_size, info.pool_bytes // info.device_blocks)
    return System(
        cost,
        info.device_blocks,
        info.model,
        info.backend,
        engine.config,
        info.max_model_len,
        info.weight_bytes,
        info.token_budget,
        spread=spread,
    )


def chats(sessions: int, clients: int, seed: int) -> Workload:
    """Chats of two to five turns with thinking users, short enough for a small machine."""
    rng, fresh = random.Random(seed), contents()
    skipped = rng.randrange(1, 20_000)
    made = []
    for n in range(sessions):
        lengths = [(rng.randint(8, 160), rng.randint(16, 64)) for _ in range(rng.randint(2, 5))]
        session = chat_session(str(n), lengths, fresh, think_s_per_token=0.005)
        moved = tuple(
            replace(turn, prompt=tuple(replace(s, content=s.content + skipped) for s in turn.prompt))
            for turn in session.turns
        )
        made.append(replace(session, turns=moved))
    return closed_loop(Workload("chats", tuple(made)), clients)


def _note_fit(console: Console, done: Compared, others_cores: float) -> None:
    decode, prefill = done.decode, done.prefill
    report.note(
        console,
        f"fit: decode {1e3 * decode.overhead_s:.2f} ms, {1e3 * decode.per_sequence_s:.2f} ms a sequence, "
        f"{1e6 * decode.per_context_token_s:.2f} us a context token; prefill {1e3 * prefill.overhead_s:.2f} ms, "
        f"{1e3 * prefill.per_token_s:.3f} ms a token; other processes took {others_cores:.2f} cores",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sim_error", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--model", help="the embedded default if left out")
    parser.add_argument("--clients", type=int, default=6, metavar="N", help="of the closed loop (default 6)")
    parser.add_argument("--sessions", type=int, default=24, metavar="N", help="to compare, of each round (24)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="default 4")
    parser.add_argument("--device-blocks", type=int, default=2048, metavar="N", help="of the KV pool (default 2048)")
    parser.add_argument("--cpu-clock", action="store_true", help="count this process's CPU time: on shared machines")
    profiling.add_argument(parser)
    report.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
