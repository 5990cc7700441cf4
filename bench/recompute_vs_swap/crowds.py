"""Sweeps C to F: which requests, on how much memory, beside which published seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from bench.recompute_vs_swap.poster import Model, cost_model, model_named, published
from bench.recompute_vs_swap.simulation import BLOCK, Request, Way, as_poster, as_served, blocks_in, requests_of, zipf
from bench.recompute_vs_swap.sweeps import Curve, Sweep, chosen
from jserve.cache.cost import swap_or_recompute

MIXED_BLOCKS = (4, 6, 8, 10, 12, 16)
MIXED_GB = 6


@dataclass(frozen=True)
class Point:
    """One workload on one amount of memory."""

    x: float | str
    model: Model
    requests: Sequence[Request]
    kv_gb: float
    block_tokens: int = BLOCK
    published: Mapping[str, float] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return blocks_in(self.kv_gb, self.model, self.block_tokens)


@dataclass(frozen=True)
class Crowd:
    """One sweep of them."""

    title: str
    x_label: str
    points: Sequence[Point]
    notes: Sequence[str] = ()


def kv_memory(workload: str, seed: int) -> Crowd:
    """C (figure 5): how much memory there is for KV."""
    there = published()["kv_memory"]
    said, llama = there[workload], model_named("llama-2-7b")
    requests = requests_of(said, said["requests"], seed)
    points = [Point(gb, llama, requests, gb, published=_at(said, i)) for i, gb in enumerate(there["x"])]
    return Crowd(f"C. KV memory, {workload} lengths (Llama-2-7B)", "GB for KV", points, [said["said"]])


def requests_and_length(seed: int) -> Crowd:
    """D (figure 4): how many requests of which length."""
    there = published()["requests_and_length"]
    llama = model_named("llama-2-7b")
    points = [
        Point(f"{count} x {name}", llama, requests_of(said, count, seed), there["kv_gb"], published=_at(said, i))
        for name, said in there["rows"].items()
        for i, count in enumerate(there["x"])
    ]
    return Crowd("D. requests x tokens each (Llama-2-7B)", "requests x tokens", points, [there["said"]])


def models(seed: int) -> Crowd:
    """E: which model. The requests are of one length, so that the seed changes nothing."""
    there = published()["models_sweep"]
    found = [model_named(name) for name in there["x"]]
    points = [
        Point(m.title, m, requests_of(there, there["requests"], seed), there["kv_gb"], published=_at(there, i))
        for i, m in enumerate(found)
    ]
    return Crowd("E. models (64 requests of 512 and 1024 tokens)", "model", points, [there["said"]])


def mixed(seed: int) -> Crowd:
    """F, not of the poster: lengths from short to long, where neither way is the better one for all."""
    llama = model_named("llama-2-7b")
    requests = zipf(128, 32, 2048, 0.5, seed)
    points = [Point(size, llama, requests, MIXED_GB, size) for size in MIXED_BLOCKS]
    title = f"F. block size, 128 requests of 32 to 2048 tokens, {MIXED_GB} GB (Llama-2-7B)"
    return Crowd(title, "tokens in a block", points, ["Not of the poster: here auto has a choice in each sweep point."])


def crowds(seed: int) -> Mapping[str, Crowd]:
    return {
        "kv_memory_zipf": kv_memory("zipf", seed),
        "kv_memory_sharegpt": kv_memory("sharegpt", seed),
        "requests_and_length": requests_and_length(seed),
        "models": models(seed),
        "mixed": mixed(seed),
    }


def overhead(crowd: Crowd, tick: Callable[[], None] = lambda: None) -> Sweep:
    """The poster's measure: seconds spent on those that gave way, all their blocks out and in, or all computed again.

    Who gives way does not depend on the way back: all requests arrive at once and a step is a step. `recompute` charges
    each victim a step of its own, `recompute_in_steps` is what the steps that it shares with others took longer.
    """
    names = ("recompute", "swap", "auto", "swap_one_way", "auto_one_way", "recompute_in_steps")
    curves: dict[str, Curve] = {name: [] for name in names}
    victims: Curve = []
    for point in crowd.points:
        run = as_poster(point.model, point.requests, point.blocks, point.block_tokens)
        sums = _charge(run.victims, point) | {"recompute_in_steps": run.recompute_s}
        for name in names:
            curves[name].append(sums[name])
        victims.append(len(run.victims))
        tick()
    for name in ("recompute", "swap"):
        there = [point.published[name] for point in crowd.points if name in point.published]
        if there:
            curves[f"{name}_published"] = there
    return Sweep(crowd.title, crowd.x_label, [point.x for point in crowd.points], curves, crowd.notes, victims)


def served(crowd: Crowd, tick: Callable[[], None] = lambda: None) -> Sweep:
    """What a user sees: seconds until the last request has ended, the way of preemption chosen by the engine's setting.

    One way: with write-through, so that little is left to copy out.
    """
    curves: dict[str, Curve] = {"recompute": [], "swap": [], "auto": [], "swap_one_way": [], "auto_one_way": []}
    for point in crowd.points:
        for name, curve in curves.items():
            way, one_way = name.removesuffix("_one_way"), name.endswith("_one_way")
            run = as_served(
                point.model, point.requests, point.blocks, point.block_tokens, cast(Way, way), write_through=one_way
            )
            curve.append(run.total_s)
            tick()
    title = f"{crowd.title}, as jserve serves it: until the last request has ended"
    return Sweep(title, crowd.x_label, [point.x for point in crowd.points], curves)


def _charge(victims: Sequence[int], point: Point) -> dict[str, float]:
    """Each by the fit, in whole blocks, which is what vLLM swaps."""
    cost, size = cost_model(point.model, point.block_tokens), point.block_tokens
    whole = [-(-tokens // size) * size for tokens in victims]
    two_way = [swap_or_recompute(cost, tokens) for tokens in whole]
    one_way = [swap_or_recompute(cost, tokens, written_tokens=tokens) for tokens in whole]
    return {
        "recompute": sum(decision.recompute_s for decision in two_way),
        "swap": sum(decision.swap_s for decision in two_way),
        "auto": sum(chosen(decision) for decision in two_way),
        "swap_one_way": sum(decision.swap_s for decision in one_way),
        "auto_one_way": sum(chosen(decision) for decision in one_way),
    }


def _at(said: Mapping[str, Curve], i: int) -> dict[str, float]:
    return {name: said[name][i] for name in ("recompute", "swap")}
