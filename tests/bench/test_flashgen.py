"""The seeds' evaluation: its settings are FlashGen's, its points deterministic, its metrics what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import flashgen, flashgen_published, report
from bench.flashgen_figures import draw_all
from bench.flashgen_runs import MODELS, Point, Run, described, read_points, run_all, simulated, throughput_at
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
    short = flashgen._short_plan(SMALL, list(MODELS))
    assert {(run.model, run.arm) for run in short} == {(m, a) for m in MODELS for a in ("vllm", "flashgen", "jserve")}
    full = flashgen._plan(SMALL, list(MODELS))
    made = [fake(run) for run in full]
    names = {path.name for path in draw_all(made, tmp_path)}
    assert names == {
        f"flashgen-{name}.png"
        for name in ("latency", "ttft", "tpot", "tiers", "utilisation", "host_size", "long_context")
    }
    metrics = flashgen._metrics(flashgen._curves(made, SMALL))
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


def fake(run: Run) -> Point:
    """A point of plausible numbers, not simulated: for what is drawn, not for what it shows."""
    names = ("ttft_p95_s", "tpot_p99_s", "mean_batch", "kv_utilisation", "kv_utilisation_when_short")
    numbers = dict.fromkeys(names, 0.5) | {
        "output_tokens_per_s": 2.0 * run.clients,
        "normalised_latency_s": 0.002 * run.clients,
    }
    numbers |= dict.fromkeys((f"{tier}_hit_share" for tier in ("device", "host", "disk")), 0.3)
    return Point(run, numbers, tuple(0.01 * p for p in range(101)), ((0.0, 0.5, 0.4), (1.0, 0.6, 0.3)))


def test_the_published_numbers_cover_all_models() -> None:
    assert set(flashgen_published.THROUGHPUT_RATIO) == set(MODELS)
    assert set(flashgen_published.TTFT_P95_S["opt-30b"]) == set(ARMS) - {"jserve"}
