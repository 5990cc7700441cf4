"""The seeds' evaluation: its settings are FlashGen's, its points deterministic, its metrics what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import flashgen, flashgen_published, report
from bench.flashgen_figures import draw_all
from bench.flashgen_runs import (
    MODELS,
    POLICY_VARIATIONS,
    VARIATIONS,
    Point,
    Run,
    around_bound,
    described,
    ratios_of,
    read_points,
    run_all,
    simulated,
    throughput_at,
    work_of,
)
from bench.flashgen_tables import tables
from jserve.cache.cost import CostModel
from jserve.progress import SilentProgress
from jserve.simulation.arms import ABLATIONS, ARMS

SMALL = Run("opt-30b", "jserve", clients=8, calls=40, warm_up_turns=2, seed=0, block_tokens=64)


def point(clients: int, rate: float, latency_s: float, **changes: Any) -> Point:
    numbers = {"output_tokens_per_s": rate, "normalised_latency_s": latency_s}
    return Point(replace(SMALL, clients=clients, **changes), numbers, (), ())


def test_the_throughput_at_a_latency_lies_between_the_points_around_it() -> None:
    curve = [point(10, 100.0, 0.05), point(20, 200.0, 0.15), point(30, 210.0, 0.9)]
    assert throughput_at(curve) == pytest.approx(150.0)
    assert throughput_at(curve[::-1]) == pytest.approx(150.0)
    assert throughput_at(curve[:1]) == 100.0
    assert throughput_at(curve[1:]) == pytest.approx(200.0 / 1.5)


def test_the_bound_is_looked_for_from_any_load() -> None:
    """These reach 100 ms a token between 50 and 60 clients."""
    asked: list[int] = []

    def simulate_all(runs: list[Run]) -> dict[Run, Point]:
        asked.extend(run.clients for run in runs)
        return {run: point(run.clients, 4.0 * run.clients, 0.1 if run.clients <= 50 else 0.2) for run in runs}

    for start in (20, 50, 60, 90):
        asked.clear()
        found = around_bound([replace(SMALL, clients=start)], simulate_all)
        assert {point.run.clients for point in found} >= {50, 60}
        assert len(asked) == len(found) == 1 + max(abs(start - n) for n in (50, 60)) // 10
        assert throughput_at(found) == 200.0
    never = around_bound([replace(SMALL, clients=20)], lambda runs: {run: point(run.clients, 1.0, 9.0) for run in runs})
    assert [p.run.clients for p in never] == [20, 10]


def test_the_machine_is_the_papers() -> None:
    of = described(SMALL)
    assert of.hardware == "2 x NVIDIA A100 80GB PCIe"
    assert of.max_model_len == 16384
    assert of.config.cache.host_gib * 2**30 == pytest.approx(224e9)
    assert of.config.cache.disk_gib * 2**30 == pytest.approx(2 * 960e9)
    assert 58_000 < of.device_blocks * 64 < 66_000  # limits, 6.6: 58 k tokens
    assert MODELS == {"opt-13b": 1, "llama-2-13b": 1, "opt-30b": 2, "llama-2-70b": 2}


def test_arms_differ_in_settings_alone() -> None:
    systems = {name: described(replace(SMALL, arm=name)) for name in ARMS}
    assert len({repr(of.cost) for of in systems.values()}) == 1
    assert len({of.device_blocks for of in systems.values()}) == 1
    assert len({of.config.sched.token_budget for of in systems.values()}) == 1
    configs = [(of.config.cache, of.config.sched) for of in systems.values()]
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])
    assert [name for name, of in systems.items() if not of.config.cache.host_gib] == ["vllm", "flashgen-sched"]


def test_an_ablation_changes_one_setting_of_the_jserve_arm() -> None:
    ours = described(SMALL).config
    for name in ABLATIONS:
        theirs = described(replace(SMALL, arm=name)).config
        changed = [
            field
            for part in ("cache", "sched")
            for field in vars(getattr(ours, part))
            if getattr(getattr(ours, part), field) != getattr(getattr(theirs, part), field)
        ]
        assert len(changed) == 1, name


def test_a_point_is_the_same_every_time_and_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(report.ROOT))  # processes of their own import `bench` as the command does
    once = simulated(SMALL)
    assert once == simulated(SMALL)
    kept = tmp_path / "points.jsonl"
    assert run_all([SMALL, replace(SMALL, clients=4)], 2, SilentProgress(), kept)[SMALL] == once
    assert {point.run.clients for point in read_points(kept)} == {4, 8}
    assert run_all([SMALL], 1, SilentProgress(), kept)[SMALL] == once
    assert once.numbers["calls"] >= 40
    assert once.numbers["refused"] == 0


def test_the_load_of_the_ttft_metric_is_where_vllm_is_as_late_as_published() -> None:
    curves = {
        ("opt-30b", "vllm"): [
            Point(replace(SMALL, clients=n), {"ttft_p95_s": s}, (), ()) for n, s in ((40, 3.0), (50, 15.0), (60, 30.0))
        ],
        ("opt-30b", "jserve"): [point(n, 1.0, 1.0) for n in (40, 50, 60)],
    }
    assert flashgen.matched_clients(curves) == 50


def test_short_covers_every_metric_and_the_full_run_every_figure(tmp_path: Path) -> None:
    short = flashgen._short_points(SMALL, list(MODELS), lambda runs: {run: fake(run) for run in runs})
    metrics = metrics_of(short)
    full = flashgen._plan(SMALL, list(MODELS))
    made = [fake(run) for run in full]
    names = {path.name for path in draw_all(made, tmp_path)}
    assert names == {
        f"flashgen-{name}.png"
        for name in ("latency", "ttft", "tpot", "tiers", "utilisation", "host_size", "long_context")
    }
    others = [replace(p, run=replace(p.run, seed=1)) for p in short]
    told = "\n".join(tables([*made, *others]))
    assert told.count("| `jserve` |") == 6
    assert told.count("| seed ") == 2
    assert "nan" not in told
    assert all(f"| {work} | " in told for work in ("sharegpt", "humaneval", "alpaca"))
    assert metrics_of(made).keys() == metrics.keys()
    assert set(metrics) >= {
        "opt13b_throughput_ratio",
        "opt30b_throughput_ratio",
        "llama2_13b_throughput_ratio",
        "llama2_70b_throughput_ratio",
        "opt30b_p95_ttft_ratio",
        "opt30b_kv_utilisation",
        "opt30b_batch_ratio",
        "jserve_over_flashgen_min",
    }


def metrics_of(points: list[Point]) -> dict[str, float]:
    curves = flashgen._curves(points, SMALL)
    return flashgen._metrics(curves, [ratios_of([point for curve in curves.values() for point in curve])])


def fake(run: Run) -> Point:
    """A point of plausible numbers, not simulated: for what is drawn, not for what it shows."""
    names = ("ttft_mean_s", "ttft_p95_s", "tpot_p99_s", "mean_batch", "kv_utilisation", "kv_utilisation_when_short")
    numbers = dict.fromkeys(names, 0.5) | {
        "output_tokens_per_s": 2.0 * run.clients,
        "normalised_latency_s": 0.002 * run.clients,
    }
    numbers |= dict.fromkeys((f"{tier}_hit_share" for tier in ("device", "host", "disk")), 0.3)
    return Point(run, numbers, tuple(0.01 * p for p in range(101)), ((0.0, 0.5, 0.4), (1.0, 0.6, 0.3)))


def test_the_published_numbers_cover_all_models() -> None:
    assert set(flashgen_published.THROUGHPUT_RATIO) == set(MODELS)
    assert set(flashgen_published.TTFT_P95_S["opt-30b"]) == set(ARMS) - {"jserve"}


def test_a_variation_moves_one_number_of_the_hardware_and_nothing_else() -> None:
    own = described(SMALL)
    parts = {"drives": {"disk_read"}, "link": {"host_to_device", "device_to_host"}}
    parts |= {"prefill": {"prefill"}, "decode": {"decode"}}
    for name in VARIATIONS:
        moved = described(replace(SMALL, variation=name))
        differing = {
            part for part in CostModel.__dataclass_fields__ if getattr(own.cost, part) != getattr(moved.cost, part)
        }
        assert differing == parts[name.split()[0]], name
        assert replace(moved, cost=own.cost) == own, name


def test_a_variation_of_policy_moves_one_number_of_the_jserve_arm_alone() -> None:
    own = described(SMALL)
    for name, changes in POLICY_VARIATIONS.items():
        moved = described(replace(SMALL, variation=name))
        assert moved == replace(own, config=replace(own.config, sched=replace(own.config.sched, **changes)))
        assert moved != own


def test_curves_are_of_the_machine_as_it_is() -> None:
    varied = replace(point(60, 1.0, 1.0), run=replace(SMALL, clients=60, variation="drives 7 GB/s"))
    assert list(flashgen._curves([point(50, 1.0, 1.0), varied], SMALL)) == [("opt-30b", "jserve")]


def test_restless_people_wait_as_long_in_the_mean() -> None:
    calm = work_of("sharegpt", 4096, 3)
    restless = work_of("restless", 4096, 3)
    waits, drawn = ([turn.think_s for s in work.sessions for turn in s.turns] for work in (calm, restless))
    assert sum(drawn) == pytest.approx(sum(waits), rel=0.05)
    assert sum(abs(a - b) for a, b in zip(waits, drawn, strict=True)) > 0.3 * sum(waits)
    assert [s.longest_tokens for s in restless.sessions] == [s.longest_tokens for s in calm.sessions]


def test_a_ratio_is_of_the_throughputs_at_the_bound() -> None:
    rates = {"vllm": 100.0, "flashgen": 150.0, "jserve": 180.0}
    points = [point(50, rate, 0.1, arm=arm, model=m) for arm, rate in rates.items() for m in MODELS]
    ratios = ratios_of(points)
    assert {ratios[m, "vllm"] for m in MODELS} == {1.8}
    assert {ratios[m, "flashgen"] for m in MODELS} == {1.2}
