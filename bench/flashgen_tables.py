"""`python -m bench.flashgen_tables POINTS`: the tables of `bench/results/flashgen.md`, from `bench.flashgen --points`.

Every number in them is simulated; none is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from bench import flashgen_published as published
from bench.flashgen_runs import (
    COMPARED,
    HOST_GB,
    MODELS,
    Point,
    at_equal_loads,
    ratios_of,
    read_points,
    throughput_at,
)
from jserve.simulation.arms import ABLATIONS, ARMS

DETAIL = "opt-30b"
TIERS = ("device", "host", "disk")


def tables(simulated: Sequence[Point]) -> Iterator[str]:
    """Each with its heading. All but that over the seeds are of the first seed."""
    seeds = sorted({point.run.seed for point in simulated})
    points = [point for point in simulated if point.run.seed == seeds[0]]
    yield _throughput(points, ARMS)
    yield _over_seeds(simulated, seeds)
    as_published, busiest = _shared_loads(points)
    yield _one_load(points, as_published, published.TTFT_P95_S[DETAIL])
    yield _one_load(points, busiest, {})
    yield _ablations(points)
    yield _host_memory(points)
    yield _long_prompts(points)
    yield _hits(points)
    yield _prompt_phase(points)


def _of(points: Sequence[Point], model: str, arm: str, work: str = "sharegpt", host_gb: float = HOST_GB) -> list[Point]:
    """By clients."""
    wanted = (model, arm, work, host_gb, "")
    found = [p for p in points if (p.run.model, p.run.arm, p.run.work, p.run.host_gb, p.run.variation) == wanted]
    return sorted(found, key=lambda p: p.run.clients)


def _markdown(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return f"{heading}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _throughput(points: Sequence[Point], arms: Iterable[str]) -> str:
    rows = []
    for arm in arms:
        rates = {model: throughput_at(_of(points, model, arm)) for model in MODELS}
        over = {model: rate / throughput_at(_of(points, model, "vllm")) for model, rate in rates.items()}
        rows.append([f"`{arm}`", *(f"{rates[model]:.0f} ({over[model]:.2f}x)" for model in MODELS)])
    rows.append(["FlashGen over vLLM, published", *(f"{published.THROUGHPUT_RATIO[model]:.2f}x" for model in MODELS)])
    return _markdown("Output tokens/s at 100 ms a token, and over the vllm arm", ["arm", *MODELS], rows)


def _over_seeds(points: Sequence[Point], seeds: Sequence[int]) -> str:
    compared = [p for m in MODELS for a in ("jserve", *COMPARED) for p in _of(points, m, a)]
    ratios = {seed: ratios_of([p for p in compared if p.run.seed == seed]) for seed in seeds}
    pairs = list(ratios[seeds[0]])
    rows = [[f"seed {seed}", *(f"{said[pair]:.2f}x" for pair in pairs)] for seed, said in ratios.items()]
    rows.append(["mean", *(f"{mean(said[pair] for said in ratios.values()):.2f}x" for pair in pairs)])
    heading = "The jserve arm over two others at 100 ms a token; a seed draws the order of the chats"
    return _markdown(heading, ["", *(f"{model} / `{over}`" for model, over in pairs)], rows)


def _ablations(points: Sequence[Point]) -> str:
    arms = ("jserve", *ABLATIONS)
    curves = {model: at_equal_loads({arm: _of(points, model, arm) for arm in arms}) for model in MODELS}
    rows = [[f"`{arm}`", *(f"{throughput_at(curves[model][arm]):.0f}" for model in MODELS)] for arm in arms]
    loads = "; ".join(f"{model} {_loads(curves[model]['jserve'])}" for model in MODELS)
    heading = f"One choice of the jserve arm taken back: output tokens/s at 100 ms a token, from equal loads ({loads})"
    return _markdown(heading, ["", *MODELS], rows)


def _loads(curve: Sequence[Point]) -> str:
    return ", ".join(str(point.run.clients) for point in curve)


def _shared_loads(points: Sequence[Point]) -> tuple[int, int]:
    """Where the vllm arm is as late as published, and where memory is short in every arm."""
    loads = set.intersection(*({p.run.clients for p in _of(points, DETAIL, arm)} for arm in ARMS))
    wanted_s = published.TTFT_P95_S[DETAIL]["vllm"]
    vllm = {p.run.clients: p.numbers["ttft_p95_s"] for p in _of(points, DETAIL, "vllm")}
    return min(loads, key=lambda n: abs(vllm[n] - wanted_s)), max(loads)


def _one_load(points: Sequence[Point], clients: int, ttfts_s: Mapping[str, float]) -> str:
    """`ttfts_s`: published, by arm, if they were under this load."""
    rows = []
    for arm in ARMS:
        (point,) = (p for p in _of(points, DETAIL, arm) if p.run.clients == clients)
        n, said = point.numbers, ttfts_s.get(arm)
        rows.append(
            [
                f"`{arm}`",
                f"{n['output_tokens_per_s']:.0f}",
                f"{1e3 * n['normalised_latency_s']:.0f}",
                f"{n['ttft_p95_s']:.2f}",
                "" if said is None else f"{said:g}",
                f"{1e3 * n['tpot_p99_s']:.0f}",
                _shares(point),
                f"{n['mean_batch']:.1f}",
                f"{n['kv_utilisation']:.2f} ({n['kv_utilisation_when_short']:.2f})",
            ]
        )
    columns = ["arm", "tokens/s", "ms a token", "P95 TTFT, s", "published", "P99 TPOT, ms"]
    columns += ["hits GPU / host / SSD", "batch", "KV held (while some wait)"]
    return _markdown(f"{DETAIL}, {clients} clients", columns, rows)


def _shares(point: Point) -> str:
    return " / ".join(f"{point.numbers[f'{tier}_hit_share']:.2f}" for tier in TIERS)


def _host_memory(points: Sequence[Point]) -> str:
    sizes = sorted({p.run.host_gb for p in points})
    rows = []
    for arm in ("flashgen", "jserve"):
        cells = []
        for gb in sizes:
            for p in _of(points, DETAIL, arm, host_gb=gb):
                if p.run.clients == 60:
                    n = p.numbers
                    cells.append(f"{n['output_tokens_per_s']:.0f}, {n['ttft_p95_s']:.1f} s, {_shares(p)}")
        rows.append([f"`{arm}`", *cells])
    heading = f"Host memory, {DETAIL}, 60 clients: tokens/s, P95 TTFT, hits GPU / host / SSD"
    return _markdown(heading, ["", *(f"{gb:g} GB" for gb in sizes)], rows)


def _long_prompts(points: Sequence[Point]) -> str:
    longest = sorted({p.run.max_tokens for p in points if p.run.work == "long"})
    rows = []
    for arm in ("vllm", "flashgen-sched", "jserve"):
        cells = []
        for tokens in longest:
            (p,) = (p for p in _of(points, DETAIL, arm, work="long") if p.run.max_tokens == tokens)
            said = published.LONG_CONTEXT.get(arm, {}).get(tokens * 16 // 17)
            n, beside = p.numbers, f" ({100 * said:.0f} %)" if said is not None else ""
            cells.append(f"{100 * n['kv_utilisation_when_short']:.0f} %{beside}, {n['output_tokens_per_s']:.0f}")
        rows.append([f"`{arm}`", *cells])
    heading = "Long prompts, 40 clients: KV held while some wait (published), tokens/s"
    return _markdown(heading, ["longest prompt", *(f"{tokens * 16 // 17 // 1024}k" for tokens in longest)], rows)


def _hits(points: Sequence[Point]) -> str:
    works = ("sharegpt", "humaneval", "alpaca")
    rows = [
        [work, "; ".join(f"{p.run.clients}: {_shares(p)}" for p in _of(points, DETAIL, "flashgen", work=work))]
        for work in works
    ]
    return _markdown(f"Hits by tier, `flashgen` on {DETAIL} (GPU / host / SSD)", ["work", "clients: hits"], rows)


def _prompt_phase(points: Sequence[Point]) -> str:
    rows = []
    for model, said in published.PROMPT_PHASE_SPEEDUP.items():
        theirs = {p.run.clients: p for p in _of(points, model, "cachedattention")}
        for ours in _of(points, model, "flashgen"):
            clients = ours.run.clients
            if clients in theirs and clients <= 40:
                ttfts = [1e3 * p.numbers["ttft_mean_s"] for p in (theirs[clients], ours)]
                device = f"{ours.numbers['device_hit_share']:.2f}"
                times = f"{ttfts[0]:.0f} / {ttfts[1]:.0f}"
                rows.append([model, str(clients), times, f"{ttfts[0] / ttfts[1]:.2f}x", f"{said}x", device])
    columns = [
        "model",
        "clients",
        "mean TTFT, ms: cachedattention / flashgen",
        "ratio",
        "published",
        "found on the GPU",
    ]
    return _markdown("Prompt phase against CachedAttention", columns, rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.flashgen_tables", description=__doc__)
    parser.add_argument("points", type=Path, help="what bench.flashgen --points has written, of a whole run")
    path = parser.parse_args().points
    try:
        points = read_points(path)
        if not points:
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{path} does not hold points ({error}): make them with bench.flashgen --points {path}")
    run = points[0].run
    print(
        f"Simulated: {len(points)} points, seed {run.seed} if none is named, blocks of {run.block_tokens} tokens. "
        "Written by `python -m bench.flashgen_tables`.\n"
    )
    for table in tables(points):
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
