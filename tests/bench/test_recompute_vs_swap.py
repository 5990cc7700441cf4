"""The study of recompute and swap: the poster's points by its fit, and auto never far from the better of the two."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

from bench.recompute_vs_swap import copying, simulated
from bench.recompute_vs_swap.__main__ import main
from bench.recompute_vs_swap.crowds import Crowd, Point, kv_memory, overhead, served
from bench.recompute_vs_swap.figures import draw, draw_real
from bench.recompute_vs_swap.poster import cost_model, model_named, published
from bench.recompute_vs_swap.real import CPU, GPU, Measured
from bench.recompute_vs_swap.real_crowds import play, sharegpt_like
from bench.recompute_vs_swap.scene import give_way, pool_blocks
from bench.recompute_vs_swap.simulation import Request, Way, as_poster, fixed, over_time, zipf
from bench.recompute_vs_swap.sweeps import Sweep, block_size, evicted_tokens, parity_block_size, parity_exact
from bench.recompute_vs_swap.turns import curves_of, in_turns
from jserve import checkpoints
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.doors import EngineInfo
from jserve.engine import Engine
from jserve.errors import JserveError
from jserve.progress import SilentProgress
from jserve.runner import Runner, make_mesh
from jserve.simulated import SimulatedClock, SimulatedExecutor, expected_tokens

LLAMA = model_named("llama-2-7b")
MODEL = Path(__file__).parents[1] / "fixtures" / "models" / "llama2_gqa"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `--sim --short --json` says."""
    out = tmp_path_factory.mktemp("out") / "out.txt"
    with pytest.MonkeyPatch.context() as patch, out.open("w") as file:
        patch.setattr("sys.stdout", file)
        patch.setattr(simulated, "SERVED", ())  # they take a while: `served` has a test of its own
        assert main(["--sim", "--short", "--json"]) == 0
    said: dict = json.loads(out.read_text().splitlines()[-1])
    return said


def test_the_fit_is_as_good_as_it_says() -> None:
    """Recompute of A to 0.3 %, pinned swap of B to 6 %."""
    evicted, sizes = evicted_tokens().curves, block_size().curves
    for x, there in zip(evicted["recompute"], published()["evicted_tokens"]["recompute"], strict=True):
        assert x == pytest.approx(there, rel=0.003)
    for x, there in zip(sizes["swap"], published()["block_size"]["swap"], strict=True):
        assert x == pytest.approx(there, rel=0.06)


def test_recompute_and_swap_meet_at_sixteen_tokens_a_block() -> None:
    assert parity_block_size() == 16
    assert 8 < parity_exact() < 16
    sizes = block_size()
    swap, recompute = sizes.curves["swap"], sizes.curves["recompute"]
    assert [s < r for s, r in zip(swap, recompute, strict=True)] == [False, False, False, True, True, True]


def test_pageable_memory_never_wins() -> None:
    curves = block_size().curves
    assert all(s > r for s, r in zip(curves["swap_pageable"], curves["recompute"], strict=True))
    assert curves["auto_pageable"] == curves["recompute"]


def test_grouped_queries_shift_everything_to_swap() -> None:
    costs = {name: cost_model(model_named(name), 16) for name in ("llama-2-7b", "llama-3.1-8b")}
    shares = {name: 2 * cost.load_s(64) / cost.prefill.seconds(1024) for name, cost in costs.items()}
    assert shares["llama-3.1-8b"] < 0.6 * shares["llama-2-7b"]


def test_auto_is_within_five_percent_of_the_better_everywhere_and_better_where_they_mix(document: dict) -> None:
    assert document["metrics"]["auto_worst_excess"] <= 0.05
    mixed = document["config"]["sweeps"]["mixed"]["curves"]
    ways = zip(mixed["auto"], mixed["recompute"], mixed["swap"], strict=True)
    assert any(auto < min(recompute, swap) for auto, recompute, swap in ways)


def test_auto_is_charged_what_was_published_for_the_way_that_it_takes() -> None:
    there = published()["evicted_tokens"]
    for x, ways in zip(
        evicted_tokens().curves["auto_published"], zip(there["recompute"], there["swap"], strict=True), strict=True
    ):
        assert x in ways


def test_the_metrics_are_those_of_the_issue(document: dict) -> None:
    assert document["bench"] == "recompute_vs_swap"
    assert document["config"]["simulated"] is True
    assert document["metrics"]["parity_block_size"] == 16
    assert 0 < document["metrics"]["published_worst_error"] < 0.2


def test_every_figure_is_drawn_from_the_json_and_is_small(document: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweeps = document["config"]["sweeps"] | {"served_crowd": asdict(served(a_small_crowd()))}
    paths = draw({"config": document["config"] | {"sweeps": sweeps}}, tmp_path)
    names = {path.stem.removeprefix("recompute_vs_swap-").partition("-")[0] for path in paths}
    assert names == {*(f"figure{i}" for i in range(2, 7)), "models", "mixed", "as"}
    assert sum(path.stat().st_size for path in paths) < 1 << 20
    assert all("<svg" in path.read_text() for path in paths)


def test_where_all_fits_nobody_gives_way() -> None:
    run = as_poster(LLAMA, fixed(8, 100, 50), blocks=8 * 10)
    assert run.victims == []
    assert run.recompute_s == 0


def test_victims_are_counted_with_what_they_had_and_charged_what_the_steps_took() -> None:
    """Two requests grow into a pool for one and a half: the younger gives way once, with the tokens that it had."""
    run = as_poster(LLAMA, [Request(256, 256), Request(256, 256)], blocks=48)
    (tokens,) = run.victims
    assert 2 * tokens == pytest.approx(48 * 16, abs=32)
    cost = cost_model(LLAMA, 16)
    assert 0 < run.recompute_s <= cost.prefill.seconds(tokens + 1)


def test_less_memory_costs_more_and_the_same_seed_the_same() -> None:
    crowd = kv_memory("zipf", seed=1)
    small, large = crowd.points[0], crowd.points[-1]
    sweep = overhead(Crowd("", "", [small, large]))
    assert sweep.curves["recompute"][0] > sweep.curves["recompute"][1] > 0
    assert sweep == overhead(Crowd("", "", [small, large]))


def test_each_way_of_preemption_is_served_to_the_end_and_none_is_far_from_another() -> None:
    crowd = a_small_crowd()
    times = {name: curve[0] for name, curve in served(crowd).curves.items()}
    assert times.keys() == {"recompute", "swap", "auto", "swap_one_way", "auto_one_way"}
    assert max(times.values()) < 1.2 * min(times.values())
    assert served(crowd).worst_excess < 0.05


def a_small_crowd() -> Crowd:
    return Crowd("", "", [Point("", LLAMA, zipf(24, 64, 512, 0.5, seed=2), kv_gb=1)])


def test_lengths_are_zipfs() -> None:
    drawn = zipf(4000, 100, 1100, 0.5, seed=3)
    lengths = [request.prompt + request.output for request in drawn]
    assert (min(lengths), max(lengths)) == pytest.approx((100, 1100), abs=10)
    below = sum(length < 350 for length in lengths) / len(lengths)
    assert below == pytest.approx(0.25**0.4, abs=0.03)  # the distribution function of k^-0.6


def test_the_time_line_counts_every_token() -> None:
    requests = fixed(20, 100, 60)
    point = Point("", LLAMA, requests, kv_gb=0.5)
    run = as_poster(point.model, requests, point.blocks)
    line = over_time(run, point.blocks, points=10)
    told = sum(rate * run.total_s / 10 for rate in line["tokens_per_s"])
    # Each request's last token is sampled and never computed; what gave way is computed again.
    assert told == pytest.approx(20 * 159 + sum(run.victims), rel=0.01)
    assert max(line["kv_usage_percent"]) <= 100


def test_without_matplotlib_the_extra_is_named(document: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from jserve.errors import Unsupported

    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unsupported, match="pip install"):
        draw(document, tmp_path)


# --- the real engine's scene, on a simulated device -------------------------------------------------------------------


@pytest.mark.parametrize("length", [64, 200, 800])
def test_the_late_request_gives_way_once_and_says_what_it_would_have_said(length: int) -> None:
    prompt = [(7 * i) % 97 for i in range(length)]
    engine = simulated_engine(pool_blocks(length, 8))
    found = give_way(engine, prompt)
    assert found.said == expected_tokens(prompt, 32, 97)
    assert length <= found.tokens < length + 32
    assert found.how == "recompute"
    again = [moment for moment in engine.history("late").timelines[0].moments if moment.kind == "resumed"]
    assert again[0].detail.startswith("0 of"), "others have taken its blocks"


def test_a_scene_in_which_nobody_overtakes_is_refused() -> None:
    with pytest.raises(JserveError, match="did not give way"):
        give_way(simulated_engine(pool_blocks(64, 8), "fcfs"), [1] * 64)


def test_the_ways_take_turns_and_the_first_turn_is_thrown_away() -> None:
    order: list[str] = []

    def run(way: Way) -> int:
        order.append(way)
        return len(order)

    seen = in_turns(run, turns=2, tick=lambda: None)
    assert order == ["recompute", "swap", "auto", "auto", "swap", "recompute", "recompute", "swap", "auto"]
    assert seen == {"recompute": [6, 7], "swap": [5, 8], "auto": [4, 9]}


def test_noise_is_what_a_way_differs_from_itself() -> None:
    curves = curves_of([{"recompute": [1.0, 1.0, 1.0], "swap": [0.9, 1.1, 1.0], "auto": [1.0, 1.0, 1.1]}])
    assert curves["swap"] == [1.0]
    assert curves["noise"] == pytest.approx([0.1])
    sweep = Sweep("", "", [1], curves)
    found = Measured("", "", cost_model(LLAMA, 16), {"evicted_tokens": sweep}).metrics()
    assert found["auto_worst_excess"] == 0
    assert found["auto_worst_excess_noise"] == pytest.approx(0.1)


@pytest.mark.parametrize("blocks", [200, 24])
def test_a_crowd_is_played_to_its_end_and_says_what_it_should(blocks: int) -> None:
    requests = [Request(20 + 7 * i, 40) for i in range(6)]
    played = play(simulated_engine(blocks), requests, seed=1)
    rng = random.Random(1)
    prompts = [[rng.randrange(97) for _ in range(request.prompt)] for request in requests]
    assert played.said == {str(i): expected_tokens(prompt, 40, 97) for i, prompt in enumerate(prompts)}
    assert (played.preemptions > 0) == (blocks == 24)
    told = over_time(played.as_run(), blocks, points=10)
    assert max(told["kv_usage_percent"]) <= 100
    assert played.samples[-1].time_s <= played.total_s


def test_sharegpts_long_turns_are_scaled_down() -> None:
    found = sharegpt_like(6, 16, seed=0)
    if found is None:
        pytest.skip("the lengths of ShareGPT are not there")
    assert len(found) == 6
    assert all(r.prompt >= 1500 // 16 and r.output >= 1024 // 16 for r in found)
    assert all(16 * (r.prompt + r.output) <= 8192 for r in found)


def test_a_short_run_is_a_part_of_the_whole() -> None:
    for sizes in (CPU, GPU):
        short = sizes.short()
        assert set(short.evicted) < set(sizes.evicted)
        assert short.block_sizes == (2, 64)
        assert short.lengths.items() < sizes.lengths.items()


@pytest.mark.parametrize("copy", [copying.pinned, copying.pageable])
def test_copies_are_timed_and_change_nothing(copy: Callable[[Runner, int], copying.Copied]) -> None:
    mesh = make_mesh(1)
    loaded = checkpoints.load(MODEL, mesh=mesh, dtype=np.float32)
    config = EngineConfig(
        cache=CacheConfig(block_size=4, device_blocks=24, host_gib=1.0),
        sched=SchedConfig(max_running=4, token_budget=8),
        runner=RunnerConfig(token_buckets=(8,), warmup=False),
    )
    runner = Runner(config, loaded.model, loaded.spec, loaded.name, mesh, SilentProgress())
    rng = np.random.default_rng(0)
    for pools in (runner._k, runner._v):
        for i, pool in enumerate(pools):
            pools[i] = jax.device_put(rng.normal(size=pool.shape).astype(np.float32), pool.sharding)
    before = [np.array(array) for array in runner._k + runner._v]
    copied = copy(runner, 20)
    assert copied.out_s > 0
    assert copied.in_s > 0
    for was, array in zip(before, runner._k + runner._v, strict=True):
        np.testing.assert_array_equal(was, np.asarray(array))
    runner.close()


def test_what_was_measured_is_drawn_beside_the_simulated(document: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = curves_of([{"recompute": [2.0, 2.0], "swap": [1.0, 1.1], "auto": [1.0, 1.2]}] * 2)
    lines = curves | {"copy_in": [0.1, 0.2], "copy_out": [0.1, 0.3]}
    one, many = Sweep("one", "tokens", [16, 64], lines), Sweep("many", "tokens of KV", [512, 768], curves)
    line = {"time_s": [0.1, 0.2], "kv_usage_percent": [90, 99], "tokens_per_s": [1, 2]}
    said = {
        "model": "tiny",
        "backend": "cpu/native",
        "sweeps": {
            "block_size": asdict(one),
            "evicted_tokens": asdict(one),
            "kv_memory_zipf": asdict(many),
            "requests_and_length": asdict(many),
        },
        "over_time": dict.fromkeys(("recompute", "swap", "auto"), line),
    }
    paths = draw_real({"config": said}, document, tmp_path)
    assert len(paths) == 5
    assert all(path.name.startswith("recompute_vs_swap-real-figure") for path in paths)
    assert all("cpu/native, measured" in path.read_text() for path in paths)


def simulated_engine(blocks: int, order: Literal["fcfs", "flashgen"] = "flashgen") -> Engine:
    clock = SimulatedClock()
    info = EngineInfo("simulated", "simulated", 97, 1000, 8, blocks, 256, "none", "simulated", 0, 0)
    config = EngineConfig(sched=SchedConfig(max_running=8, token_budget=256, order=order))
    return Engine(config, info, SimulatedExecutor(clock, blocks, 8, 97), clock)
