"""`python -m bench.returns`: what predicting returns is worth, on work that suits it and on work that does not.

Simulated, as `bench.flashgen`: OPT-30B on two A100, where half of the histories do not fit into host memory. For each
work every strategy of eviction, without and with reading ahead; all else is the `jserve` arm. The works:

- sharegpt: the client model of FlashGen, whose think time grows with the answer.
- humaneval: the same with other lengths.
- constant: ShareGPT's chats, but everybody thinks for 80 s.
- random: ShareGPT's chats, but think times are exponential, 80 s in the mean, whatever the answer.
- agents: ShareGPT's chats, but the next question comes after 2 s in the mean, and one in twenty after 300 s.
- mooncake: the conversation trace of a service, at its own times (Llama-3-8B on four H200, room for a million tokens on
  the devices and 1.6 on the host). Its answers are of unknown text, so that no history reaches past a question.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

from bench import report
from bench.flashgen_runs import Run, described, work_of
from bench.workloads import lengths
from jserve.cache.hierarchy import TieredCache
from jserve.config import CacheConfig, Eviction, SchedConfig
from jserve.console import RichProgress
from jserve.engine import Engine
from jserve.simulation.arms import arm
from jserve.simulation.playing import Span
from jserve.simulation.profiles import hardware, model_shape
from jserve.simulation.simulator import System, simulate, system
from jserve.simulation.summary import summarise
from jserve.simulation.traces import read_trace
from jserve.simulation.workload import Turn, Workload, closed_loop

WORKS = ("sharegpt", "humaneval", "constant", "random", "agents", "mooncake")
CLIENTS = {"sharegpt": 50, "humaneval": 150, "constant": 50, "random": 50, "agents": 25}
WARM_UP_TURNS, BLOCK_TOKENS, MAX_TOKENS = 10, 64, 16384
MEAN_THINK_S = 80.0
READ_AHEAD_S = CacheConfig().read_ahead_s
MOONCAKE_DEVICES, MOONCAKE_BLOCKS, MOONCAKE_HOST_GIB, MOONCAKE_MAX_TOKENS = 4, 8000, 200.0, 131_072


@dataclass(frozen=True)
class Case:
    """One simulation."""

    work: str
    eviction: Eviction
    read_ahead: bool
    calls: int
    seed: int


def simulated(case: Case) -> dict[str, float]:
    """What came of it."""
    caches: list[TieredCache] = []

    def watch(engine: Engine) -> None:
        assert isinstance(engine.cache, TieredCache)
        caches.append(engine.cache)

    done = simulate(_system(case), _work(case), span=_span(case), watch=watch)
    summary, stats, model = summarise(done.played), caches[0].tier_stats, caches[0].tiers.returns.model
    return {
        "ttft_mean_s": summary.ttft_mean_s,
        "ttft_p95_s": summary.ttft_p95_s,
        "host_hit_share": summary.host_hit_share,
        "disk_hit_share": summary.disk_hit_share,
        "read_ahead_used": stats.read_ahead_hits / stats.read_ahead_blocks if stats.read_ahead_blocks else 0.0,
        "predicts": model.trusted,
        "error_share": model.error_s / model.mean_s if model.mean_s else 0.0,
    }


def _span(case: Case) -> Span:
    return Span(0 if case.work == "mooncake" else WARM_UP_TURNS, case.calls)


def _system(case: Case) -> System:
    if case.work == "mooncake":
        sizes = CacheConfig(
            block_size=128,
            device_blocks=MOONCAKE_BLOCKS,
            host_gib=MOONCAKE_HOST_GIB,
            disk_dir="simulated",
            disk_gib=2000.0,
        )
        caching, scheduling = arm("jserve").policies(sizes, SchedConfig(max_waiting=100_000, admission="queue"))
        of = system(
            hardware("h200"),
            model_shape("llama-3-8b"),
            tp=MOONCAKE_DEVICES,
            drives=1,
            max_model_len=MOONCAKE_MAX_TOKENS,
            cache=caching,
            sched=scheduling,
        )
    else:
        run = Run("opt-30b", "jserve", CLIENTS[case.work], case.calls, WARM_UP_TURNS, case.seed, BLOCK_TOKENS)
        of = described(run)
    caching = replace(of.config.cache, eviction=case.eviction, read_ahead_s=READ_AHEAD_S * case.read_ahead)
    return replace(of, config=replace(of.config, cache=caching))


def _work(case: Case) -> Workload:
    if case.work == "mooncake":
        return read_trace(lengths.MOONCAKE, MOONCAKE_MAX_TOKENS)
    rng = random.Random(case.seed)
    think_s: dict[str, Callable[[Turn], float]] = {
        "constant": lambda turn: MEAN_THINK_S,
        "random": lambda turn: rng.expovariate(1 / MEAN_THINK_S),
        "agents": lambda turn: 300.0 if rng.random() < 0.05 else rng.expovariate(1 / 2.0),
    }
    work = work_of("humaneval" if case.work == "humaneval" else "sharegpt", MAX_TOKENS, case.seed)
    if case.work in think_s:
        work = _thinking(work, think_s[case.work])
    return closed_loop(work, CLIENTS[case.work])


def _thinking(work: Workload, think_s: Callable[[Turn], float]) -> Workload:
    """The same sessions with other think times."""
    sessions = (
        replace(session, turns=tuple(replace(turn, think_s=think_s(turn)) for turn in session.turns))
        for session in work.sessions
    )
    return replace(work, sessions=tuple(sessions))


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    for work, eviction, read_ahead in product(args.works, get_args(Eviction), (False, True)):
        if work != "mooncake" or lengths.MOONCAKE.exists():
            yield Case(work, eviction, read_ahead, args.calls, args.seed)


def main() -> int:
    args = _arguments()
    console = report.console(args)
    cases, results = list(_cases(args)), []
    with RichProgress().track("simulations", len(cases)) as task, ProcessPoolExecutor(args.jobs) as pool:
        for result in pool.map(simulated, cases):
            results.append(result)
            task.advance()
    columns = ["work", "eviction", "read ahead", *results[0]]
    rows = [[c.work, c.eviction, c.read_ahead, *r.values()] for c, r in zip(cases, results, strict=True)]
    console.print(report.table("predicted returns (simulated)", columns, rows))
    metrics: dict[str, float] = {}
    for case, result in zip(cases, results, strict=True):
        name = f"{case.work}_{case.eviction}{'_read_ahead' if case.read_ahead else ''}"
        metrics |= {f"{name}_ttft_mean_s": result["ttft_mean_s"], f"{name}_ttft_p95_s": result["ttft_p95_s"]}
    report.emit(report.Result("returns", metrics, {"simulated": True, "calls": args.calls}, args.seed), args)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.returns", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), help="which (default: all)")
    parser.add_argument("--calls", type=int, default=1000, help="requests of each after the warm-up (default 1000)")
    parser.add_argument("--jobs", type=int, default=1, help="simulations at once (default 1)")
    report.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
