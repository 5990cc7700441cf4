"""The simulator is the production engine in simulated time: exact, deterministic, right where it can be reckoned."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jserve.cache.hierarchy import TieredCache
from jserve.cache.transfer import stores_a_step
from jserve.config import CacheConfig, SchedConfig
from jserve.errors import ConfigError
from jserve.simulation.playing import Span
from jserve.simulation.profiles import (
    cost_model,
    device_blocks,
    hardware,
    hardware_names,
    model_names,
    model_shape,
)
from jserve.simulation.simulator import System, build, simulate, system
from jserve.simulation.summary import kv_utilisation, mean_batch, summarise
from jserve.simulation.workload import Segment, Session, Turn, Workload, chat_session, closed_loop, contents, poisson

TIERED = CacheConfig(host_gib=20.0, disk_dir="simulated", disk_gib=200.0)


def chats(count: int, turns: int = 6) -> Workload:
    fresh = contents()
    made = (chat_session(str(n), [(40 + n % 30, 100 + 7 * n % 200)] * turns, fresh) for n in range(count))
    return Workload("chats", tuple(made))


def opt(cache: CacheConfig | None = None, blocks: int = 600) -> System:
    described = system(hardware("a100-80gb-pcie"), model_shape("opt-13b"), max_model_len=4096, cache=cache)
    return replace(described, device_blocks=blocks)


def single(prompt: int, output: int) -> Workload:
    return Workload("one", (Session("0", (Turn((Segment(1, prompt),), output),)),))


def test_one_request_alone_takes_its_prefill_and_its_decodes() -> None:
    described = opt()
    cost = described.cost
    (call,) = simulate(described, single(1000, 11)).played.calls
    assert call.first_s == pytest.approx(max(cost.decode.overhead_s, cost.prefill.seconds(1000)), rel=1e-6)
    decodes = sum(cost.decode.seconds(1, 1001 + i) for i in range(10))
    assert call.end_s - call.first_s == pytest.approx(decodes, rel=1e-6)


def test_the_same_seed_gives_the_same_run_to_the_last_digit() -> None:
    work = closed_loop(chats(20), 6)
    once, again = (simulate(opt(TIERED), work).played.calls for _ in range(2))
    assert once == again


def test_planning_many_steps_at_once_changes_no_time_and_no_decision() -> None:
    work = closed_loop(chats(12), 6)
    slow = simulate(opt(blocks=200), work, most_steps=1)
    fast = simulate(opt(blocks=200), work)
    assert fast.played.stats_after["preemptions"] == slow.played.stats_after["preemptions"]
    assert fast.played.stats_after["steps"] == slow.played.stats_after["steps"]
    for a, b in zip(fast.played.calls, slow.played.calls, strict=True):
        assert (a.session, a.turn, a.cached_tokens) == (b.session, b.turn, b.cached_tokens)
        assert a.end_s == pytest.approx(b.end_s, rel=1e-9)


def test_planning_many_steps_at_once_writes_through_as_much() -> None:
    """When a batch of 64 has decoded 640 tokens each, what it filled has been copied to the host."""
    sessions = (Session(str(n), (Turn((Segment(n + 1, 16),), 640),)) for n in range(64))
    cache = replace(TIERED, host_gib=200.0)
    slow, fast = (
        simulate(opt(cache, blocks=3000), work, most_steps=most).played.stats_after
        for work in (closed_loop(Workload("at once", tuple(sessions)), 64),)
        for most in (1, 64)
    )
    assert slow["cache_stored_blocks"] > 2400
    assert fast["cache_stored_blocks"] > 0.8 * slow["cache_stored_blocks"], "all but the last plan's"
    assert fast["cache_skipped_stores"] == slow["cache_skipped_stores"] == 0


def test_tiers_keep_what_the_device_has_no_room_for() -> None:
    work = closed_loop(chats(24), 12)
    alone = summarise(simulate(opt(blocks=250), work).played)
    tiered = summarise(simulate(opt(TIERED, blocks=250), work).played)
    assert tiered.host_hit_share + tiered.device_hit_share > alone.device_hit_share
    assert tiered.cached_share > 0.5
    assert tiered.ttft_p95_s < alone.ttft_p95_s


def test_copies_take_their_time_on_the_link() -> None:
    """A history that only the host has: loading it takes at least its bytes over the link."""
    said = Turn((Segment(1, 2000),), 8), Turn((Segment(2, 1),), 8, think_s=10.0)
    between = Session("b", (Turn((Segment(3, 3000),), 8),), start_s=5.0)
    work = Workload("w", (Session("a", said), between))
    described = opt(replace(TIERED, restore="always"), blocks=200)
    calls = {(c.session, c.turn): c for c in simulate(described, work).played.calls}
    back = calls["a", 1]
    assert back.cached_tokens >= 1900
    blocks = back.cached_tokens // 16
    assert back.ttft_s > described.cost.load_s(blocks * 0.5)
    assert back.ttft_s < described.cost.prefill.seconds(2000)


def test_where_copies_take_turns_with_steps_a_prompt_is_in_the_step_after_its_copy() -> None:
    """Beside a chat that decodes, one returns whose history is on the host. On a GPU it joins the step after the one
    that its copy ends beside; on a CPU the copy is in the queue before its own step, if it is no longer than one part.
    """
    described = opt(TIERED, blocks=90)
    small, large = replace(described.cost, block_bytes=1 << 18), described.cost
    ttft_s = {
        (cost.block_bytes, beside): returned_ttft_s(replace(described, cost=replace(cost, copies_beside_steps=beside)))
        for cost in (small, large)
        for beside in (True, False)
    }
    step_s = described.cost.decode.seconds(1, 200)
    saved_s = ttft_s[small.block_bytes, True] - ttft_s[small.block_bytes, False]
    assert saved_s == pytest.approx(step_s - small.load_s(31), rel=0.1)
    late_s = ttft_s[large.block_bytes, False] - ttft_s[large.block_bytes, True]
    assert 29 * step_s < late_s < 33 * (step_s + large.load_s(1)), "31 blocks, one after each step"


def returned_ttft_s(described: System) -> float:
    """Of a chat whose 31 blocks others have taken on the device."""
    fresh = contents()
    returning = chat_session("returning", [(512, 8), (8, 8)], fresh, think_s_per_token=0.0)
    first, second = returning.turns
    returning = replace(returning, turns=(first, replace(second, think_s=2.0)))
    flood = Session("flood", (Turn((Segment(next(fresh), 1400),), 8),), start_s=1.0)
    decoding = Session("decoding", (Turn((Segment(next(fresh), 8),), 400),), start_s=2.0)
    played = simulate(described, Workload("work", (returning, flood, decoding)), most_steps=1).played
    (back,) = (call for call in played.calls if (call.session, call.turn) == ("returning", 1))
    assert back.cached_tokens == 512
    return back.ttft_s


def test_write_through_keeps_up_with_prompts_as_it_does_in_production() -> None:
    """Simulated and real caches have one formula: a step of prompts is copied after that step, whatever the blocks."""
    for block, budget, most in ((16, 2048, 64), (64, 2048, 32), (64, 256, 16)):
        described = replace(opt(replace(TIERED, block_size=block)), token_budget=budget)
        cache = build(described)[0].cache
        assert isinstance(cache, TieredCache)
        assert cache.stores.budget == most == stores_a_step(budget, block)


def test_the_warm_up_does_not_count() -> None:
    run = simulate(opt(), closed_loop(chats(200), 5), span=Span(warm_up_turns=3, calls=100))
    summary = summarise(run.played)
    assert run.played.warm_s > 0
    assert 95 <= summary.calls <= 105
    assert sum(call.end_s <= run.played.warm_s for call in run.played.calls) == 3 * 5, "three turns a client, together"
    assert 0 < kv_utilisation(run) <= 1
    assert 1 <= mean_batch(run) <= 5


def test_a_call_that_can_never_run_is_told() -> None:
    run = simulate(opt(), single(5000, 10))
    assert "5000 tokens" in run.played.calls[0].refused
    with pytest.raises(ConfigError, match="5000 tokens"):
        summarise(run.played)


def test_more_load_means_more_latency() -> None:
    latencies = []
    for rate in (0.2, 2.0, 20.0):
        work = poisson(chats(60, turns=1), rate, 1)
        latencies.append(summarise(simulate(opt(), work).played).normalised_latency_s)
    assert latencies == sorted(latencies)


def test_a_full_queue_is_counted_as_refusals() -> None:
    described = opt(blocks=100)
    tight = replace(described, config=replace(described.config, sched=SchedConfig(max_running=1, max_waiting=1)))
    summary = summarise(simulate(tight, poisson(chats(40, turns=1), 50.0, 1)).played)
    assert summary.refused > 0
    assert summary.calls + summary.refused == 40


# --- the profiles


@pytest.mark.parametrize("name", hardware_names())
def test_every_number_of_the_hardware_has_a_source(name: str) -> None:
    gpu = hardware(name)
    assert all(gpu.sources.values())
    assert set(gpu.sources) | {"name", "title", "sources"} == set(gpu.__dataclass_fields__)


@pytest.mark.parametrize("name", model_names())
def test_every_model_has_a_source_and_a_plausible_shape(name: str) -> None:
    model = model_shape(name)
    assert model.source
    attention = 2 * model.hidden * model.head_dim * (model.heads + model.kv_heads) * model.layers
    assert attention < model.parameters < 20 * attention


def test_kv_sizes_are_those_of_the_seeds() -> None:
    sizes = {"opt-13b": 819_200, "opt-30b": 1_376_256, "llama-2-7b": 524_288, "llama-2-70b": 327_680}
    assert {name: model_shape(name).kv_bytes_per_token(2) for name in sizes} == sizes


def test_decode_and_break_even_are_those_of_the_formulas() -> None:
    """limits, 6.3: 32 ms for OPT-30B on two A100, 16 users with 2,048 tokens each, without launches and collectives."""
    gpu = replace(hardware("a100-80gb-sxm"), decode_s_per_layer=0.0, peer_latency_s=0.0, peer_bytes_per_s=1e18)
    cost = cost_model(gpu, model_shape("opt-30b"), tp=2)
    assert cost.decode.seconds(16, 16 * 2048) == pytest.approx(0.032, rel=0.02)
    fit = replace(gpu, linear_efficiency=0.765, attention_efficiency=0.79, prefill_s_per_layer=8.5e-3 / 32)
    poster = cost_model(fit, model_shape("llama-2-7b")).prefill
    for tokens, seconds in ((1024, 0.0675), (2048, 0.1284), (4096, 0.2575), (8192, 0.5440), (16384, 1.2168)):
        assert poster.seconds(tokens) == pytest.approx(seconds, rel=0.01)


def test_a_model_that_does_not_fit_is_told_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="use --tp 2"):
        device_blocks(hardware("a100-80gb"), model_shape("llama-2-70b"))


def test_unknown_names_are_told_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"did you mean a100-80gb-sxm\?"):
        hardware("a100-80gb-sx")
    with pytest.raises(ConfigError, match=r"use one of .*opt-13b"):
        model_shape("gpt-5")
