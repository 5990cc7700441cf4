"""FlashGen's evaluation as simulations: its machine, models, client model and metrics (ASPLOS'25, section 5).

Every point is one simulation, a pure function of its description, so that points run in processes of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.workloads import lengths
from jserve.config import CacheConfig, SchedConfig
from jserve.progress import Progress
from jserve.simulation.arms import arm
from jserve.simulation.gauges import Observed
from jserve.simulation.playing import Span
from jserve.simulation.profiles import Hardware, hardware, model_shape
from jserve.simulation.simulator import System, simulate, system
from jserve.simulation.summary import kv_utilisation, mean_batch, measured, percentile, summarise
from jserve.simulation.workload import Workload, closed_loop

GPU = "a100-80gb-pcie"
"""Standard_NC48ads_A100_v4: two A100 80 GB PCIe, 440 GB of DRAM, two NVMe drives of 960 GB in RAID-0."""
DRIVES = 2
HOST_GB, DISK_GB = 224.0, 1920.0
MAX_TOKENS = 16384
MAX_RUNNING, TOKEN_BUDGET = 256, 2048
WARM_UP_TURNS = 30
"""Of each client, in the mean. FlashGen skips ten: then chats are younger here than in steady state, 2,200 to 2,900
tokens a prompt, and the load still grows; from thirty on the mean stays near 3,500 (published: 3,418 of history)."""
BOUND_S = 0.1
"""The latency for each output token at which throughputs are compared."""
MODELS = {"opt-13b": 1, "opt-30b": 2, "llama-2-13b": 1, "llama-2-70b": 2}
"""With the devices that each was served on."""
SATURATED = 0.5
"""With so many waiting in the mean, a stretch of time counts as one in which memory is short."""


VARIATIONS: Mapping[str, Callable[[Hardware], Hardware]] = {
    "drives 1.5 GB/s": lambda gpu: replace(gpu, disk_read_bytes_per_s=1.5e9),
    "drives 3.5 GB/s": lambda gpu: replace(gpu, disk_read_bytes_per_s=3.5e9),
    "drives 7 GB/s": lambda gpu: replace(gpu, disk_read_bytes_per_s=7e9),
    "link 13 GB/s": lambda gpu: replace(gpu, link_bytes_per_s=13e9),
    "link 20 GB/s": lambda gpu: replace(gpu, link_bytes_per_s=20e9),
    "prefill efficiency 0.45": lambda gpu: replace(gpu, linear_efficiency=0.45, attention_efficiency=0.45),
    "prefill efficiency 0.65": lambda gpu: replace(gpu, linear_efficiency=0.65, attention_efficiency=0.65),
    "decode launch 25 us": lambda gpu: replace(gpu, decode_s_per_layer=25e-6),
    "decode launch 100 us": lambda gpu: replace(gpu, decode_s_per_layer=100e-6),
}
"""One number of the profile moved: of a drive, of a device's link, a share of the peak, a layer's launches."""
POLICY_VARIATIONS: Mapping[str, Mapping[str, Any]] = {
    "turns of 64 tokens": {"turn_tokens": 64},
    "turns of 256 tokens": {"turn_tokens": 256},
    "yields when 20 s ahead": {"ahead_s": 20.0},
    "yields when 80 s ahead": {"ahead_s": 80.0},
}
"""One number of the scheduler moved, which only the jserve arm has a use for (`jserve.sched.turns`)."""


@dataclass(frozen=True)
class Run:
    """One simulation."""

    model: str
    arm: str
    clients: int
    calls: int
    warm_up_turns: int
    seed: int
    block_tokens: int
    work: str = "sharegpt"
    host_gb: float = HOST_GB
    max_tokens: int = MAX_TOKENS
    variation: str = ""
    """Of `VARIATIONS` or `POLICY_VARIATIONS`; empty: the profile's own numbers, and the scheduler's."""


@dataclass(frozen=True)
class Point:
    """What came of it."""

    run: Run
    numbers: Mapping[str, float]
    """`summary.Summary`, KV utilisation and batch."""
    tpot_s: tuple[float, ...]
    """Percentiles 0 to 100 of the calls."""
    utilisation: tuple[tuple[float, float, float], ...]
    """(time, share held, share cached) over the run."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.run) | dict(self.numbers)


def sizes(block_tokens: int, host_gb: float) -> CacheConfig:
    """FlashGen's memory below the device."""
    return CacheConfig(
        block_size=block_tokens,
        host_gib=host_gb * 1e9 / 2**30,
        disk_dir="simulated",
        disk_gib=DISK_GB * 1e9 / 2**30,
    )


def described(run: Run) -> System:
    """The machine under the run's policies."""
    limits = SchedConfig(max_running=MAX_RUNNING, token_budget=TOKEN_BUDGET, max_waiting=100_000, admission="queue")
    caching, scheduling = arm(run.arm).policies(sizes(run.block_tokens, run.host_gb), limits)
    gpu = hardware(GPU)
    if run.variation in POLICY_VARIATIONS:
        scheduling = replace(scheduling, **POLICY_VARIATIONS[run.variation])
    elif run.variation:
        gpu = VARIATIONS[run.variation](gpu)
    return system(
        gpu,
        model_shape(run.model),
        tp=MODELS[run.model],
        drives=DRIVES,
        max_model_len=run.max_tokens,
        cache=caching,
        sched=scheduling,
    )


@cache
def work_of(name: str, max_tokens: int, seed: int) -> Workload:
    """sharegpt, alpaca, humaneval, restless (sharegpt with think times drawn at random), or long (single requests
    with prompts up to `max_tokens`)."""
    match name:
        case "sharegpt":
            return lengths.sharegpt(max_tokens, seed)
        case "restless":
            return lengths.restless(lengths.sharegpt(max_tokens, seed), seed)
        case "alpaca":
            return lengths.like(lengths.ALPACA, max_tokens, seed)
        case "humaneval":
            return lengths.like(lengths.HUMANEVAL, max_tokens, seed)
    return lengths.long_context(max_tokens * 16 // 17, 20_000, seed)


def simulated(run: Run) -> Point:
    """One point."""
    work = closed_loop(work_of(run.work, run.max_tokens, run.seed), run.clients)
    done = simulate(described(run), work, span=Span(run.warm_up_turns, run.calls))
    tpots = [call.tpot_s for call in measured(done.played) if not call.refused and call.output_tokens > 1]
    warm = [sample for sample in done.gauges.samples if sample.time_s > done.played.warm_s]
    thinned = warm[:: max(1, len(warm) // 300)]
    return Point(
        run,
        numbers_of(done),
        tuple(percentile(tpots, p) for p in range(101)),
        tuple((s.time_s - done.played.warm_s, s.held, s.cached) for s in thinned),
    )


def numbers_of(run: Observed) -> dict[str, float]:
    """What is told of a run, simulated or real."""
    return summarise(run.played).as_dict() | {
        "kv_utilisation": kv_utilisation(run),
        "kv_utilisation_when_short": _utilisation_when_short(run),
        "mean_batch": mean_batch(run),
    }


def _utilisation_when_short(done: Observed) -> float:
    """Share of the device's blocks that requests held while others waited (as figures 7 and 18)."""
    short = [s for s in done.gauges.samples if s.time_s > done.played.warm_s and s.waiting >= SATURATED]
    spans = sum(s.span_s for s in short)
    return sum(s.held * s.span_s for s in short) / spans if spans else kv_utilisation(done)


def run_all(runs: Iterable[Run], jobs: int, progress: Progress, file: Path | None = None) -> dict[Run, Point]:
    """Every point, each once. Whatever the number of processes, the same numbers.

    `file`: gets every point as it ends, a line of JSON each; what it holds already is not simulated again.
    """
    points = {point.run: point for point in read_points(file)} if file is not None and file.exists() else {}
    todo = [run for run in dict.fromkeys(runs) if run not in points]

    def keep(point: Point) -> None:
        points[point.run] = point
        task.advance()
        if file is not None:
            with file.open("a") as lines:
                lines.write(json.dumps(asdict(point)) + "\n")

    with progress.track("simulations", len(todo)) as task:
        if jobs == 1:
            for run in todo:
                keep(simulated(run))
            return points
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:  # a fork may hold another thread's locks
            for ended in as_completed([pool.submit(simulated, run) for run in todo]):
                keep(ended.result())
    return points


def read_points(file: Path) -> list[Point]:
    """What `run_all` has written."""
    said = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        Point(
            Run(**point["run"]), point["numbers"], tuple(point["tpot_s"]), tuple(tuple(r) for r in point["utilisation"])
        )
        for point in said
    ]


def throughput_at(points: Sequence[Point], bound_s: float = BOUND_S) -> float:
    """Output tokens/s at which the normalised latency reaches the bound, between the two points around it.

    The points of one arm at growing numbers of clients. If none reaches the bound, the last one's throughput; if all
    exceed it, the first one's, scaled down to the bound.
    """
    ordered = sorted(points, key=lambda point: point.run.clients)
    before: Point | None = None
    for point in ordered:
        latency_s, rate = point.numbers["normalised_latency_s"], point.numbers["output_tokens_per_s"]
        if latency_s > bound_s:
            if before is None:
                return rate * bound_s / latency_s
            low_s, low = before.numbers["normalised_latency_s"], before.numbers["output_tokens_per_s"]
            return low + (rate - low) * (bound_s - low_s) / (latency_s - low_s)
        before = point
    assert before is not None, "there are points"
    return before.numbers["output_tokens_per_s"]


def around_bound(
    starts: Iterable[Run], simulate_all: Callable[[list[Run]], Mapping[Run, Point]], step: int = 10
) -> list[Point]:
    """Each run at loads `step` clients apart, from its own on, until one is within the bound and the next is not."""
    curves: dict[Run, list[Point]] = {start: [] for start in starts}
    wanted = {start: start.clients for start in curves}
    while wanted:
        asked = {start: replace(start, clients=clients) for start, clients in wanted.items()}
        points = simulate_all(list(asked.values()))
        for start, run in asked.items():
            curves[start].append(points[run])
        wanted = {start: n for start, curve in curves.items() if (n := _next_load(curve, step)) is not None}
    return [point for curve in curves.values() for point in curve]


def _next_load(curve: Sequence[Point], step: int) -> int | None:
    """None if the bound lies between two loads, or below the first that there could be."""
    loads = [point.run.clients for point in curve]
    within = [point.numbers["normalised_latency_s"] <= BOUND_S for point in curve]
    if all(within):
        return max(loads) + step
    return min(loads) - step if not any(within) and min(loads) > step else None


COMPARED = ("vllm", "flashgen")
"""The arms that the headline's ratios are over."""


def ratios_of(points: Sequence[Point]) -> dict[tuple[str, str], float]:
    """By model and compared arm: the jserve arm's throughput at the bound over that arm's."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        curves.setdefault((point.run.model, point.run.arm), []).append(point)
    at = {key: throughput_at(curve) for key, curve in curves.items() if key[1] in ("jserve", *COMPARED)}
    models = {model: None for model, _ in at}
    return {(model, over): at[model, "jserve"] / at[model, over] for model in models for over in COMPARED}


def at_equal_loads(curves: Mapping[str, Sequence[Point]]) -> dict[str, list[Point]]:
    """By arm, the points under the loads that all of these arms ran: a finer curve bends, and would serve more."""
    loads = set.intersection(*({point.run.clients for point in curve} for curve in curves.values()))
    return {arm: [point for point in curve if point.run.clients in loads] for arm, curve in curves.items()}


def with_clients(run: Run, clients: Iterable[int]) -> list[Run]:
    return [replace(run, clients=n) for n in clients]
