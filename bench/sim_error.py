"""`python -m bench.sim_error`: how far the simulator is from the real engine, on this machine, with a real model.

An engine in this process serves chats and notes what each step held and took; from that the steps' costs are fitted.
Then other chats are served by the real engine, and by the simulator with those costs. Rounds of the two are interleaved
with fits, and each round's error is that of its own fit; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass, replace
from statistics import median

from rich.console import Console

from bench import profiling, report
from jserve.cache.cost import CostModel, DecodeCost, LinkCost, PrefillCost
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.console import RichProgress
from jserve.engine import Engine
from jserve.errors import JserveError
from jserve.simulation.fitting import RecordingExecutor, fit_steps
from jserve.simulation.playing import play
from jserve.simulation.simulator import System, simulate
from jserve.simulation.summary import Summary, summarise
from jserve.simulation.workload import Workload, chat_session, closed_loop, contents

COMPARED = {
    "throughput_error": "output_tokens_per_s",
    "ttft_p50_error": "ttft_p50_s",
    "ttft_p95_error": "ttft_p95_s",
    "tpot_p50_error": "tpot_p50_s",
}


@dataclass(frozen=True)
class Round:
    """One fit, and what both worlds made of other work."""

    prefill: PrefillCost
    decode: DecodeCost
    real: Summary
    simulated: Summary

    def error(self, name: str) -> float:
        """Relative; above 0 where the simulation says more."""
        real, said = self.real.as_dict()[name], self.simulated.as_dict()[name]
        return said / real - 1


def main() -> int:
    args = _arguments()
    console = report.console(args)
    try:
        rounds = _rounds(args)
    except JserveError as error:
        print(f"bench.sim_error: {error}", file=sys.stderr)
        return 2
    metrics: dict[str, float] = {}
    rows: list[list[object]] = []
    for metric, name in COMPARED.items():
        errors = [abs(done.error(name)) for done in rounds]
        metrics[metric] = median(errors)
        rows.append(
            [
                name,
                median(done.real.as_dict()[name] for done in rounds),
                median(done.simulated.as_dict()[name] for done in rounds),
                f"{100 * median(done.error(name) for done in rounds):+.1f} %",
                " ".join(f"{100 * done.error(name):+.1f}" for done in rounds),
            ]
        )
    _show(console, rows, rounds)
    config = {"clients": args.clients, "sessions": args.sessions, "rounds": args.rounds, "model": args.model}
    report.emit(report.Result("sim_error", metrics, config, args.seed), args)
    return 0


def _rounds(args: argparse.Namespace) -> list[Round]:
    progress = RichProgress()
    config = EngineConfig(
        model=args.model,
        cache=CacheConfig(device_blocks=args.device_blocks),
        sched=SchedConfig(max_running=max(8, args.clients)),
        max_model_len=2048,
        runner=RunnerConfig(**profiling.of(args)),
    )
    engine = Engine.from_config(config, progress)
    recorder = RecordingExecutor(engine.executor, engine.clock)
    engine.executor = recorder
    rounds = []
    try:
        play(engine, chats(4, args.clients, args.seed), progress=progress)  # first calls cost extra
        for n in range(args.rounds):
            recorder.samples.clear()
            fitting = chats(args.sessions, args.clients, args.seed + 2 * n + 1)
            play(engine, replace(fitting, name="to fit"), progress=progress)
            prefill, decode = fit_steps(recorder.samples)
            work = replace(chats(args.sessions, args.clients, args.seed + 2 * n + 2), name="to compare")
            real = summarise(play(engine, work, progress=progress))
            done = simulate(_system(engine, prefill, decode), work, most_steps=1)
            rounds.append(Round(prefill, decode, real, summarise(done.played)))
    finally:
        engine.close()
    return rounds


def _system(engine: Engine, prefill: PrefillCost, decode: DecodeCost) -> System:
    """The same engine, with the fitted steps: it has no tiers, so that copies do not count."""
    info = engine.info
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


def _show(console: Console, rows: list[list[object]], rounds: list[Round]) -> None:
    columns = ["", "real", "simulated", "error", "each round, %"]
    console.print(report.table("the simulator beside the real engine, on the same work", columns, rows))
    decode, prefill = rounds[-1].decode, rounds[-1].prefill
    report.note(
        console,
        f"last fit: decode {1e3 * decode.overhead_s:.2f} ms, {1e3 * decode.per_sequence_s:.2f} ms a sequence, "
        f"{1e6 * decode.per_context_token_s:.2f} us a context token; prefill {1e3 * prefill.overhead_s:.2f} ms, "
        f"{1e3 * prefill.per_token_s:.3f} ms a token; {rounds[-1].real.calls} calls a round",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sim_error", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--model", help="the embedded default if left out")
    parser.add_argument("--clients", type=int, default=6, metavar="N", help="of the closed loop (default 6)")
    parser.add_argument("--sessions", type=int, default=24, metavar="N", help="of each part of a round (default 24)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--device-blocks", type=int, default=2048, metavar="N", help="of the KV pool (default 2048)")
    profiling.add_argument(parser)
    report.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
