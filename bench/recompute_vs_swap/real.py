"""The poster's sweeps on the real engine, on this machine: scaled down where that is a CPU, as published on a GPU.

A and B are `real_returns`, C and D `real_crowds`; `Sizes` says how large. Every way must give the same answers at every
point. `Measured.metrics` has what `auto` lost against the better of the other two, beside the noise of the same point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import jax

from bench import profiling
from bench.noise import Noise
from bench.recompute_vs_swap import real_crowds, real_returns
from bench.recompute_vs_swap.real_crowds import PlayedWays, Point, play_each_way, play_once, same_tokens, sharegpt_like
from bench.recompute_vs_swap.real_returns import Returned, returned
from bench.recompute_vs_swap.scene import pool_blocks
from bench.recompute_vs_swap.simulation import Request, fixed, over_time, zipf
from bench.recompute_vs_swap.sweeps import Sweep, excess
from bench.recompute_vs_swap.turns import WAYS
from bench.tier_engines import make_runner
from jserve import calibrate
from jserve.cache.cost import CostModel
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.progress import Progress, SilentProgress
from jserve.runner import Runner
from jserve.transfer import JaxTransfer

SAME_MEMORY = (
    "Pinned or pageable is no question on a CPU: the device's memory is the host's. There is one curve for both."
)
NO_SHAREGPT = "C with ShareGPT's lengths is left out: the file of its lengths is not there."


@dataclass(frozen=True)
class Sizes:
    """How large the sweeps are, in tokens and requests."""

    shape: str
    budget: int
    """Of a step."""
    token_buckets: tuple[int, ...] | None
    evicted: tuple[int, ...]
    """A: tokens of the prompt."""
    block_sizes: tuple[int, ...]
    block_prompt: int
    zipf: tuple[int, int]
    """C: the shortest and the longest request; a third of each is its prompt."""
    kv_requests: int
    kv_tokens: tuple[int, ...]
    sharegpt_requests: int
    sharegpt_scale: int
    counts: tuple[int, ...]
    """D: requests."""
    lengths: Mapping[str, int | tuple[int, int]]
    """D: tokens of each, half of them its prompt; or the ends of a Zipf draw."""
    crowd_kv_tokens: int
    turns: int
    """Times that one request is measured at a point; `crowd_turns`: that many requests are."""
    crowd_turns: int

    def short(self) -> Sizes:
        """The ends of each sweep, and less of it."""
        last = [*self.lengths][-1]
        return replace(
            self,
            evicted=(self.evicted[0], self.evicted[-2]),
            block_sizes=(self.block_sizes[0], self.block_sizes[-1]),
            kv_tokens=(self.kv_tokens[0], self.kv_tokens[-1]),
            kv_requests=self.kv_requests // 2,
            sharegpt_requests=self.sharegpt_requests // 2,
            counts=self.counts[:2],
            lengths={last: self.lengths[last]},
            turns=2,
            crowd_turns=2,
        )


CPU = Sizes(
    shape="tiny",
    budget=256,
    token_buckets=(4, 16, 64, 256),
    evicted=(16, 64, 256, 1024),
    block_sizes=(2, 4, 8, 16, 32, 64),
    block_prompt=256,
    zipf=(64, 256),
    kv_requests=12,
    kv_tokens=(512, 768, 1024, 1536),
    sharegpt_requests=6,
    sharegpt_scale=16,
    counts=(4, 8, 16),
    lengths={"64": 64, "256": 256, "16 to 256": (16, 256)},
    crowd_kv_tokens=768,
    turns=5,
    crowd_turns=3,
)
GPU = Sizes(
    shape="llama-2-7b-64k",
    budget=2048,
    token_buckets=None,
    evicted=(1024, 2048, 4096, 8192, 16384),
    block_sizes=(2, 4, 8, 16, 32, 64),
    block_prompt=4096,
    zipf=(512, 2048),
    kv_requests=128,
    kv_tokens=(11444, 19073, 26703, 34332, 41962, 45776),  # 6 to 24 GB of Llama-2-7B's, as the poster
    sharegpt_requests=32,
    sharegpt_scale=1,
    counts=(32, 64, 128),
    lengths={"1K": 1024, "2K": 2048, "128 to 2K": (128, 2048)},
    crowd_kv_tokens=45776,
    turns=3,
    crowd_turns=2,
)


@dataclass
class Measured:
    """What the machine says."""

    model: str
    backend: str
    cost: CostModel
    """What the engine decides by."""
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    over_time: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    """For each way, the first point of sweep C: blocks in use, and tokens/s."""
    notes: list[str] = field(default_factory=list)
    same_tokens: bool = True
    """Whether every way gave the same answers, at every point."""
    auto_swapped: int = 0
    """Points of A and B at which auto chose to swap."""
    others_cores: float = 0.0
    """That other processes took meanwhile."""

    def metrics(self) -> dict[str, float]:
        points = [point for sweep in self.sweeps.values() for point in _excesses(sweep)]
        worst, noise = max(points)
        evicted = self.sweeps["evicted_tokens"].curves
        shares = [swap / recompute for swap, recompute in zip(evicted["swap"], evicted["recompute"], strict=True)]
        return {
            "auto_worst_excess": worst,
            "auto_worst_excess_noise": noise,
            "auto_worst_excess_beyond_noise": max(max(0.0, found - noise) for found, noise in points),
            "auto_median_excess": median(found for found, _ in points),
            "noise_median": median(noise for _, noise in points),
            "points": len(points),
            "auto_swapped": self.auto_swapped,
            "swap_over_recompute_shortest": shares[0],
            "swap_over_recompute_longest": shares[-1],
            "same_tokens": int(self.same_tokens),
            "others_cores": self.others_cores,
        }


def _excesses(sweep: Sweep) -> list[tuple[float, float]]:
    """How much worse auto is than the better of the two at each point, as a share, and the noise there."""
    ways = zip(*(sweep.curves[way] for way in (*WAYS, "noise")), strict=True)
    return [(excess(auto, min(recompute, swap)), noise) for recompute, swap, auto, noise in ways]


def measure(
    sizes: Sizes, model: str | None, seed: int, progress: Progress, window: profiling.Window | None = None
) -> Measured:
    """All sweeps. `model`: instead of the shape with random weights. `window`: what to trace, of a crowd that is played
    once more for it, each way, so that no measured time has a trace in it."""
    noise = Noise()
    size, _ = EngineConfig().block_and_budget(jax.default_backend())
    blocks = max(pool_blocks(max(sizes.evicted), size), max(*sizes.kv_tokens, sizes.crowd_kv_tokens) // size)
    runner, cost = _runner(sizes, model, None, max(*sizes.counts, sizes.kv_requests), blocks, progress)
    try:
        found = Measured(runner.info.model, runner.info.backend, cost)
        if runner.copies_directly:
            found.notes.append(SAME_MEMORY)
        _evicted_tokens(found, runner, sizes, seed, progress)
        _crowds(found, runner, sizes, seed, progress)
        if window is not None and window["profile_dir"] is not None:
            _profile(runner, cost, sizes, seed, window, progress)
    finally:
        runner.close()
    _block_sizes(found, model, sizes, seed, progress)
    found.others_cores = noise.others_cores()
    return found


def _runner(
    sizes: Sizes, model: str | None, block_size: int | None, running: int, blocks: int, progress: Progress
) -> tuple[Runner, CostModel]:
    config = EngineConfig(
        model=model,
        cache=CacheConfig(block_size=block_size, device_blocks=blocks, host_gib=1.0),
        sched=SchedConfig(max_running=running, token_budget=sizes.budget),
        runner=RunnerConfig(token_buckets=sizes.token_buckets),
    )
    runner = make_runner(config, None if model else sizes.shape, SilentProgress())
    return runner, calibrate.measure(config, runner, JaxTransfer(runner), progress)


def _evicted_tokens(found: Measured, runner: Runner, sizes: Sizes, seed: int, progress: Progress) -> None:
    with progress.track("A: evicted tokens", len(sizes.evicted) * (sizes.turns + 1) * len(WAYS)) as task:
        points = [returned(runner, found.cost, n, n, sizes.turns, seed, task.advance) for n in sizes.evicted]
    _note_returns(found, points)
    title = f"A. tokens evicted, blocks of {runner.info.block_size}"
    found.sweeps["evicted_tokens"] = real_returns.sweep_of(title, "tokens of the prompt", points)


def _block_sizes(found: Measured, model: str | None, sizes: Sizes, seed: int, progress: Progress) -> None:
    """A runner for each size, which is part of the compiled programs."""
    length, points = sizes.block_prompt, []
    with progress.track("B: block sizes", len(sizes.block_sizes) * (sizes.turns + 1) * len(WAYS)) as task:
        for size in sizes.block_sizes:
            runner, cost = _runner(sizes, model, size, 3, pool_blocks(length, size), progress)
            try:
                points.append(returned(runner, cost, size, length, sizes.turns, seed, task.advance))
            finally:
                runner.close()
    _note_returns(found, points)
    title = f"B. block size, {length} tokens evicted"
    found.sweeps["block_size"] = real_returns.sweep_of(title, "tokens in a block", points)


def _note_returns(found: Measured, points: Sequence[Returned]) -> None:
    found.same_tokens &= all(point.same_tokens for point in points)
    found.auto_swapped += sum(point.auto_swapped for point in points)


def _crowds(found: Measured, runner: Runner, sizes: Sizes, seed: int, progress: Progress) -> None:
    draws = {"kv_memory_zipf": ("Zipf", _zipf_crowd(sizes, seed))}
    sharegpt = sharegpt_like(sizes.sharegpt_requests, sizes.sharegpt_scale, seed)
    if sharegpt is not None:
        draws["kv_memory_sharegpt"] = "ShareGPT", sharegpt
    else:
        found.notes.append(NO_SHAREGPT)
    crowds = {
        name: (f"C. KV memory, {len(draw)} requests of {title} lengths", "tokens of KV", _by_memory(draw, sizes))
        for name, (title, draw) in draws.items()
    }
    title = f"D. requests x tokens each, {sizes.crowd_kv_tokens} tokens of KV"
    crowds["requests_and_length"] = title, "requests x tokens", _by_count(sizes, seed)
    runs = sum(1 + sizes.crowd_turns * len(points) for _, _, points in crowds.values()) * len(WAYS)
    with progress.track("C and D: many at once", runs) as task:
        for name, (title, label, points) in crowds.items():
            played: list[PlayedWays] = []
            for point in points:
                warm_up = int(not played)
                played.append(play_each_way(runner, found.cost, point, sizes.crowd_turns, warm_up, seed, task.advance))
                found.same_tokens &= same_tokens(played[-1])
            found.sweeps[name] = real_crowds.sweep_of(title, label, points, played)
            if name == "kv_memory_zipf":
                blocks = points[0].blocks(runner.info.block_size)
                found.over_time = {way: over_time(runs[-1].as_run(), blocks) for way, runs in played[0].items()}


def _profile(
    runner: Runner, cost: CostModel, sizes: Sizes, seed: int, window: profiling.Window, progress: Progress
) -> None:
    """The crowd of sweep C on the least memory: there most give way."""
    point = _by_memory(_zipf_crowd(sizes, seed), sizes)[0]
    for way in WAYS:
        with profiling.steps(runner, window, way, progress.note):
            play_once(runner, cost, point, way, seed)


def _zipf_crowd(sizes: Sizes, seed: int) -> list[Request]:
    return zipf(sizes.kv_requests, *sizes.zipf, 1 / 3, seed)


def _by_memory(requests: Sequence[Request], sizes: Sizes) -> list[Point]:
    return [Point(tokens, requests, tokens) for tokens in sizes.kv_tokens]


def _by_count(sizes: Sizes, seed: int) -> list[Point]:
    return [
        Point(f"{count} x {name}", _requests(count, tokens, seed), sizes.crowd_kv_tokens)
        for name, tokens in sizes.lengths.items()
        for count in sizes.counts
    ]


def _requests(count: int, tokens: int | tuple[int, int], seed: int) -> list[Request]:
    if isinstance(tokens, int):
        return fixed(count, tokens // 2, tokens - tokens // 2)
    return zipf(count, *tokens, 0.5, seed)
