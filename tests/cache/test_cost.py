"""The cost model reproduces published measurements, and its decisions are the best there are, quickly enough."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jserve.cache.cost import (
    CostModel,
    DecodeCost,
    LinkCost,
    PrefillCost,
    Reach,
    always_load,
    break_even_bytes_per_s,
    by_cost,
    never_load,
    restore_strategy,
    swap_or_recompute,
)
from jserve.cache.cost_fit import fit_decode, fit_link, fit_prefill
from jserve.errors import ConfigError

A100_FLOPS, H200_FLOPS = 312e12, 989e12
LLAMA2_7B = {"num_params": 6.74e9, "num_layers": 32, "query_width": 4096}

# "Uncover the Overhead and Resource Usage for Handling KV Cache Overflow in LLM Inference" (SC'24 poster), A100-40GB,
# Llama-2-7B: seconds to recompute so many tokens at block 16, and to swap about 4 K tokens out and in, by block size.
RECOMPUTE_S = {1024: 0.0675, 2048: 0.1284, 4096: 0.2575, 8192: 0.5440, 16384: 1.2168}
SWAP_4K_S = {2: 0.8063, 4: 0.5066, 8: 0.3342, 16: 0.2544, 32: 0.2105, 64: 0.1808}
PINNED_PCIE4 = LinkCost(26.7e9, 2.46e-6)


def llama2_7b_on_a100(block: int = 16) -> CostModel:
    """Swapped as vLLM did it: one copy for each layer's K and V of a block."""
    prefill = PrefillCost.from_flops(
        **LLAMA2_7B, flops_per_s=A100_FLOPS, linear_efficiency=0.765, attention_efficiency=0.79, overhead_s=0.0085
    )
    return CostModel(
        prefill,
        DecodeCost(0.01),
        replace(PINNED_PCIE4),
        replace(PINNED_PCIE4),
        disk_read=LinkCost(3.5e9, 1e-4),
        disk_write=LinkCost(2e9, 1e-4),
        block_tokens=block,
        block_bytes=524_288 * block,
        blocks_per_copy=1,
    )


@pytest.mark.parametrize("tokens", RECOMPUTE_S)
def test_prefill_time_of_llama2_7b_is_the_published_one_within_half_a_percent(tokens: int) -> None:
    assert llama2_7b_on_a100().prefill.seconds(tokens) == pytest.approx(RECOMPUTE_S[tokens], rel=0.005)


@pytest.mark.parametrize("block", SWAP_4K_S)
def test_swap_time_by_block_size_is_the_published_one_within_six_percent(block: int) -> None:
    copies = 4096 // block * 2 * LLAMA2_7B["num_layers"]
    out_and_in = 2 * PINNED_PCIE4.seconds(4096 * 524_288, copies)
    assert out_and_in == pytest.approx(SWAP_4K_S[block], rel=0.06)


def per_layer_copies(block: int) -> CostModel:
    model = llama2_7b_on_a100(block)
    each = 2 * LLAMA2_7B["num_layers"] * PINNED_PCIE4.per_copy_s
    model.host_to_device = LinkCost(PINNED_PCIE4.bytes_per_s, each)
    model.device_to_host = LinkCost(PINNED_PCIE4.bytes_per_s, each)
    return model


def test_two_way_swap_and_recompute_are_at_par_at_block_16() -> None:
    at_16 = swap_or_recompute(per_layer_copies(16), 4096)
    assert at_16.swap_s == pytest.approx(at_16.recompute_s, rel=0.1)
    assert not swap_or_recompute(per_layer_copies(8), 4096).swap
    assert swap_or_recompute(per_layer_copies(32), 4096).swap


def test_written_through_blocks_are_swapped_one_way() -> None:
    model = per_layer_copies(8)
    one_way = swap_or_recompute(model, 4096, written_tokens=4096)
    assert one_way.swap_s == pytest.approx(swap_or_recompute(model, 4096).swap_s / 2)
    assert one_way.swap


def test_a_swap_without_room_on_the_host_is_a_recompute() -> None:
    model = per_layer_copies(64)
    assert swap_or_recompute(model, 4096).swap
    assert not swap_or_recompute(model, 4096, host_room_blocks=63).swap
    assert swap_or_recompute(model, 4096, written_tokens=4096, host_room_blocks=0).swap


def test_where_others_run_a_slow_copy_beside_them_is_better_than_to_compute_before_them() -> None:
    at_8 = per_layer_copies(8)
    alone = swap_or_recompute(at_8, 4096)
    assert not alone.swap
    among = swap_or_recompute(at_8, 4096, others=1)
    assert among.swap
    assert (among.swap_s, among.recompute_s) == (alone.swap_s, alone.recompute_s)
    in_their_way = replace(at_8, copies_beside_steps=False)
    assert not swap_or_recompute(in_their_way, 4096, others=20).swap
    slow = replace(at_8, host_to_device=LinkCost(1e8), device_to_host=LinkCost(1e8))
    assert not swap_or_recompute(slow, 4096, others=1).swap


@pytest.mark.parametrize(
    ("name", "num_params", "kv_bytes", "flops", "efficiency", "gb_per_s"),
    [
        ("Llama-2-7B, A100", 6.74e9, 524_288, A100_FLOPS, 0.6, 7.3),
        ("Llama-2-7B, A100", 6.74e9, 524_288, A100_FLOPS, 0.75, 9.1),
        ("OPT-13B, A100", 12.85e9, 819_200, A100_FLOPS, 0.6, 6.0),
        ("OPT-13B, A100", 12.85e9, 819_200, A100_FLOPS, 0.75, 7.5),
        ("OPT-30B, 2 A100", 29.97e9, 1_376_256, 2 * A100_FLOPS, 0.6, 8.6),
        ("OPT-30B, 2 A100", 29.97e9, 1_376_256, 2 * A100_FLOPS, 0.75, 10.8),
        ("Llama-2-70B, 2 A100", 68.98e9, 327_680, 2 * A100_FLOPS, 0.6, 0.9),
        ("Llama-2-70B, 2 A100", 68.98e9, 327_680, 2 * A100_FLOPS, 0.75, 1.1),
        ("OPT-13B, H200", 12.85e9, 819_200, H200_FLOPS, 0.55, 17.3),
    ],
)
def test_loading_wins_from_the_first_order_break_even_bandwidth_on(
    name: str, num_params: float, kv_bytes: int, flops: float, efficiency: float, gb_per_s: float
) -> None:
    linear = PrefillCost.from_flops(num_params, 0, 0, flops, linear_efficiency=efficiency, overhead_s=0)
    assert break_even_bytes_per_s(linear, 4096, kv_bytes) / 1e9 == pytest.approx(gb_per_s, abs=0.1), name


def test_attention_only_helps_loading() -> None:
    prefill = llama2_7b_on_a100().prefill
    needed = [break_even_bytes_per_s(prefill, tokens, 524_288) for tokens in (4096, 8192, 16384)]
    assert needed == sorted(needed, reverse=True)
    assert break_even_bytes_per_s(prefill, 100, 524_288, fixed_s=1.0) == math.inf


def mha_on_nvme() -> CostModel:
    """OPT-30B on two A100s: NVMe at 3.5 GB/s is slower than computing."""
    prefill = PrefillCost.from_flops(29.97e9, 48, 7168, 2 * A100_FLOPS, overhead_s=0.01)
    kv = 1_376_256 * 16
    return CostModel(
        prefill, DecodeCost(0.03), LinkCost(50e9), LinkCost(50e9), LinkCost(3.5e9), LinkCost(3e9), 16, kv, 8
    )


def gqa_on_nvme() -> CostModel:
    """Llama-2-70B on two A100s: the same disk is four times as fast as computing."""
    prefill = PrefillCost.from_flops(68.98e9, 80, 8192, 2 * A100_FLOPS, overhead_s=0.01)
    kv = 327_680 * 16
    return CostModel(
        prefill, DecodeCost(0.05), LinkCost(50e9), LinkCost(50e9), LinkCost(3.5e9), LinkCost(3e9), 16, kv, 8
    )


def test_a_disk_slower_than_computing_is_left_alone_by_whoever_reads_before_he_computes() -> None:
    reach = Reach(4096 + 90, device_blocks=0, host_blocks=0, disk_blocks=256)
    mha, gqa = mha_on_nvme(), gqa_on_nvme()
    assert always_load(mha, reach).ttft_s > never_load(mha, reach).ttft_s
    assert always_load(gqa, reach).ttft_s < never_load(gqa, reach).ttft_s / 3


def either_s(model: CostModel, reach: Reach) -> float:
    """Until the first token, if all is loaded or all is computed."""
    return min(always_load(model, reach).ttft_s, never_load(model, reach).ttft_s)


def test_near_the_break_even_reading_beside_computing_takes_half_of_either() -> None:
    model = mha_on_nvme()
    model.disk_read.bytes_per_s = break_even_bytes_per_s(model.prefill, 4096, 1_376_256)
    reach = Reach(4186, 0, 0, 256)
    plan = by_cost(model, reach)
    start, end = plan.gap
    assert (plan.stage_disk_blocks, end) == (0, 256)
    assert 100 < start < 156
    assert plan.ttft_s == pytest.approx(either_s(model, reach) / 2, rel=0.15)


def test_a_slow_link_from_the_host_is_used_beside_computing_too() -> None:
    model = mha_on_nvme()
    model.host_to_device.bytes_per_s = break_even_bytes_per_s(model.prefill, 4096, 1_376_256)
    reach = Reach(4186, 0, 256, 256)
    plan = by_cost(model, reach)
    assert plan.load_host_blocks == 0
    assert plan.ttft_s == pytest.approx(either_s(model, reach) / 2, rel=0.15)


def test_what_the_queue_hides_is_no_reason_to_compute() -> None:
    reach = Reach(4186, 0, 0, 256, waiting=2, hidden_s=2.0)
    assert by_cost(mha_on_nvme(), reach).stage_disk_blocks == 256
    half = by_cost(mha_on_nvme(), replace(reach, hidden_s=0.8))
    start, end = half.gap
    assert end - start > math.floor(0.8 / mha_on_nvme().stage_s(1))


def test_those_who_wait_for_the_device_make_it_load_rather_than_compute() -> None:
    plan = by_cost(gqa_on_nvme(), Reach(4186, 0, 0, 256, others=3))
    assert (plan.gap, plan.stage_disk_blocks, plan.recompute_tokens) == ((0, 0), 256, 90)


def test_a_disk_that_is_busy_for_longer_than_computing_takes_is_left_alone() -> None:
    reach, computing_s = Reach(4186, 0, 0, 256), gqa_on_nvme().prefill.seconds(4186)
    busy = by_cost(gqa_on_nvme(), replace(reach, disk_wait_s=computing_s))
    assert (busy.stage_disk_blocks, busy.gap) == (0, (0, 0))
    behind = by_cost(gqa_on_nvme(), replace(reach, disk_wait_s=computing_s, hidden_s=2 * computing_s))
    assert behind.stage_disk_blocks == 256


def test_a_read_that_holds_up_others_must_be_worth_that_too() -> None:
    reach = Reach(4186, 0, 0, 256, others=3)
    assert by_cost(gqa_on_nvme(), reach).stage_disk_blocks == 256
    holding_up = by_cost(gqa_on_nvme(), replace(reach, readers=1000))
    assert (holding_up.stage_disk_blocks, holding_up.gap) == (0, (0, 0))


def test_the_host_part_is_loaded_before_the_disk_part_is_read_beside_computing() -> None:
    plan = by_cost(mha_on_nvme(), Reach(4186, device_blocks=10, host_blocks=100, disk_blocks=256))
    start, end = plan.gap
    assert (plan.load_host_blocks, plan.stage_disk_blocks, end) == (90, 0, 256)
    assert start > 100
    assert plan.recompute_tokens == (start - 100) * 16 + 90


def test_a_gap_that_saves_little_is_not_worth_its_chunks() -> None:
    fast = mha_on_nvme()
    fast.disk_read.bytes_per_s = fast.host_to_device.bytes_per_s = 1e12
    assert by_cost(fast, Reach(4186, 0, 0, 256)).gap == (0, 0)


def test_what_has_no_room_is_deferred_not_forgotten() -> None:
    plan = by_cost(gqa_on_nvme(), Reach(4186, 0, 50, 256, staging_room_blocks=20, others=3))
    assert (plan.load_host_blocks, plan.stage_disk_blocks, plan.deferred_disk_blocks) == (50, 20, 186)
    assert plan.recompute_tokens == 4186 - 70 * 16


def test_a_gap_for_which_there_is_no_room_at_all_is_deferred() -> None:
    plan = by_cost(mha_on_nvme(), Reach(4186, 0, 0, 256, staging_room_blocks=0))
    wider = by_cost(mha_on_nvme(), Reach(4186, 0, 0, 256))
    assert (plan.gap, plan.stage_disk_blocks) == ((0, 0), 0)
    assert plan.deferred_disk_blocks == wider.gap[1] - wider.gap[0]


def test_flashgen_reads_the_disk_only_behind_a_waiting_request() -> None:
    choose = restore_strategy("flashgen")
    alone, behind = Reach(4186, 0, 100, 256), Reach(4186, 0, 100, 256, waiting=1)
    for model in (mha_on_nvme(), gqa_on_nvme()):
        assert (choose(model, alone).load_host_blocks, choose(model, alone).stage_disk_blocks) == (100, 0)
        assert (choose(model, behind).load_host_blocks, choose(model, behind).stage_disk_blocks) == (100, 156)


def test_the_threshold_asks_for_a_long_read_and_a_queue() -> None:
    choose = restore_strategy("threshold:2048")
    model = mha_on_nvme()
    assert choose(model, Reach(4186, 0, 128, 256, waiting=1)).stage_disk_blocks == 128
    assert choose(model, Reach(4186, 0, 129, 256, waiting=1)).stage_disk_blocks == 0
    assert choose(model, Reach(4186, 0, 0, 256, waiting=0)).stage_disk_blocks == 0


def test_always_and_never_look_at_nothing() -> None:
    reach = Reach(4186, 10, 100, 256)
    always, never = restore_strategy("always")(mha_on_nvme(), reach), restore_strategy("never")(gqa_on_nvme(), reach)
    assert (always.load_host_blocks, always.stage_disk_blocks) == (90, 156)
    assert (never.load_host_blocks, never.stage_disk_blocks, never.recompute_tokens) == (0, 0, 4186 - 160)


@pytest.mark.parametrize("name", ["best", "threshold", "threshold:", "threshold:-1", "cost:3", ""])
def test_an_unknown_strategy_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match="cost, flashgen, always, never, or threshold:TOKENS"):
        restore_strategy(name)


def test_reaches_that_shrink_from_tier_to_tier_are_refused() -> None:
    with pytest.raises(ValueError, match="must grow"):
        Reach(100, 3, 2, 5)


def test_the_reason_says_what_and_why() -> None:
    reason = by_cost(gqa_on_nvme(), Reach(4186, 0, 0, 256, others=3)).reason
    assert reason.startswith("least time: load 0 and stage 256 blocks, compute 90 tokens in ")
    start, end = (plan := by_cost(mha_on_nvme(), Reach(4186, 0, 0, 256))).gap
    said = f"compute {plan.recompute_tokens} tokens, bring {end - start} more blocks beside it in "
    assert said in plan.reason


# --- properties of the choice

MICROSECONDS = st.integers(0, 5000).map(lambda us: us * 1e-6)
MODELS = st.builds(
    lambda t0, a, b, link, disk, per_copy, per_read: CostModel(
        PrefillCost(t0, a, b),
        DecodeCost(0.01),
        LinkCost(link * 1e8, per_copy),
        LinkCost(link * 1e8, per_copy),
        LinkCost(disk * 1e7, per_read),
        LinkCost(1e9),
        block_tokens=16,
        block_bytes=1 << 20,
        blocks_per_copy=4,
    ),
    t0=MICROSECONDS,
    a=MICROSECONDS,
    b=st.integers(0, 1000).map(lambda ns: ns * 1e-9),
    link=st.integers(1, 1000),
    disk=st.integers(1, 3000),
    per_copy=MICROSECONDS,
    per_read=MICROSECONDS,
)
REACHES = st.builds(
    lambda a, b, c, extra, hidden, room, busy, readers: Reach(
        (a + b + c) * 16 + extra,
        a,
        a + b,
        a + b + c,
        hidden_s=hidden,
        staging_room_blocks=room,
        disk_wait_s=busy,
        readers=readers,
    ),
    a=st.integers(0, 20),
    b=st.integers(0, 60),
    c=st.integers(0, 120),
    extra=st.integers(1, 200),
    hidden=st.integers(0, 3000).map(lambda ms: ms * 1e-3),
    room=st.integers(0, 200),
    busy=st.sampled_from([0.0, 0.0, 0.01, 0.3, 2.0]),
    readers=st.sampled_from([0, 0, 1, 10]),
)


def split(plan: Any) -> int:
    return int(plan.load_host_blocks + plan.stage_disk_blocks)


def split_delay_s(model: CostModel, reach: Reach, x: int) -> float:
    """Of loading up to x, and then computing: what the request and those beside it wait together."""
    unread_s = model.stage_s(max(0, x - reach.host_blocks))
    read_s = max(0.0, reach.disk_wait_s + unread_s - reach.hidden_s) if x > reach.host_blocks else 0.0
    load_s = read_s + model.load_s(x - reach.device_blocks)
    compute_s = model.prefill.seconds(reach.prompt_tokens - 16 * x, 16 * x)
    return reach.hidden_s + load_s + (1 + reach.others) * compute_s + reach.readers * unread_s


def gap_delay_s(model: CostModel, reach: Reach, front: int, start: int, end: int) -> float:
    """Of loading up to `front`, and computing the blocks before `start` while those of the gap are brought."""
    front_s = model.load_s(front - reach.device_blocks)
    unread_s = model.stage_s(max(0, end - max(start, reach.host_blocks)))
    waited_s = reach.disk_wait_s if end > reach.host_blocks else 0.0
    read_s = max(0.0, waited_s + unread_s - reach.hidden_s - front_s)
    bring_s = max(model.load_s(end - start), read_s + model.load_s(1))
    before_s = model.prefill.seconds(16 * (start - front), 16 * front)
    after_s = model.prefill.seconds(reach.prompt_tokens - 16 * end, 16 * end)
    alone_s = reach.hidden_s + front_s + max(bring_s, before_s) + after_s
    return alone_s + reach.others * (before_s + after_s) + reach.readers * unread_s


def best_split_delay_s(model: CostModel, reach: Reach) -> float:
    most = min(reach.disk_blocks, reach.host_blocks + reach.staging_room_blocks)
    return min(split_delay_s(model, reach, x) for x in range(reach.device_blocks, most + 1))


def best_gap_delay_s(model: CostModel, reach: Reach) -> float:
    device, host, disk, room = reach.device_blocks, reach.host_blocks, reach.disk_blocks, reach.staging_room_blocks
    gaps = [(device, s, min(disk, host + room)) for s in range(device + 1, min(host, min(disk, host + room) - 1) + 1)]
    gaps += [(host, s, disk) for s in range(max(host + 1, disk - room), disk)]
    return min((gap_delay_s(model, reach, *gap) for gap in gaps), default=math.inf)


def delay_s(model: CostModel, reach: Reach, plan: Any) -> float:
    front = reach.device_blocks + plan.load_host_blocks
    if plan.gap[1]:
        return gap_delay_s(model, reach, front, *plan.gap)
    return split_delay_s(model, reach, front + plan.stage_disk_blocks)


OTHERS = st.sampled_from([0, 0, 1, 3, 50])


@settings(max_examples=400, deadline=None)
@given(MODELS, REACHES, OTHERS)
def test_no_split_is_better_and_no_gap_by_much(model: CostModel, reach: Reach, others: int) -> None:
    reach = replace(reach, others=others)
    plan = by_cost(model, reach)
    chosen_s, split_s, gap_s = (
        delay_s(model, reach, plan),
        best_split_delay_s(model, reach),
        best_gap_delay_s(model, reach),
    )
    assert chosen_s <= split_s * (1 + 1e-9) + 1e-12
    if plan.gap[1]:
        assert chosen_s == pytest.approx(gap_s, rel=1e-9, abs=1e-12)
    else:
        assert chosen_s == pytest.approx(split_s, rel=1e-9, abs=1e-12)
        assert gap_s - reach.hidden_s >= 0.8 * (split_s - reach.hidden_s) - 1e-9
    if not reach.others and not reach.readers:
        assert plan.ttft_s == pytest.approx(chosen_s, rel=1e-9, abs=1e-12)


def computed_s(model: CostModel, reach: Reach, plan: Any) -> float:
    """What of the plan the device computes."""
    front = reach.device_blocks + plan.load_host_blocks
    start, end = plan.gap if plan.gap[1] else (front, front + plan.stage_disk_blocks)
    before_s = model.prefill.seconds(16 * (start - front), 16 * front)
    return before_s + model.prefill.seconds(reach.prompt_tokens - 16 * end, 16 * end)


@settings(max_examples=300, deadline=None)
@given(MODELS, REACHES, st.integers(1, 50))
def test_where_others_wait_the_device_computes_no_longer(model: CostModel, reach: Reach, others: int) -> None:
    """Unless a gap is given up: it must save a share of the time, and of what all together wait it may save less."""
    beside = replace(reach, others=reach.others + others)
    alone_plan, beside_plan = by_cost(model, reach), by_cost(model, beside)
    if not alone_plan.gap[1] or beside_plan.gap[1]:
        longest_s = computed_s(model, reach, alone_plan) * (1 + 1e-9) + 1e-12
        assert computed_s(model, beside, beside_plan) <= longest_s


@settings(max_examples=300, deadline=None)
@given(MODELS, REACHES, st.integers(2, 10))
def test_of_a_faster_disk_never_less_is_read(model: CostModel, reach: Reach, times: int) -> None:
    """Of a gap it may be: a block more is computed where that takes no time, and it must save a share of the time."""
    disk = LinkCost(model.disk_read.bytes_per_s * times, model.disk_read.per_copy_s / times)
    slow, fast = by_cost(model, reach), by_cost(replace(model, disk_read=disk), reach)
    if not slow.gap[1] and not fast.gap[1]:
        assert fast.stage_disk_blocks >= slow.stage_disk_blocks


@settings(max_examples=300, deadline=None)
@given(MODELS, REACHES, st.integers(1, 3000))
def test_a_longer_queue_never_reads_less(model: CostModel, reach: Reach, more_ms: int) -> None:
    longer = replace(reach, hidden_s=reach.hidden_s + more_ms * 1e-3)
    before, after = (by_cost(model, r) for r in (reach, longer))
    if not before.gap[1] and not after.gap[1]:  # as above
        assert after.stage_disk_blocks >= before.stage_disk_blocks


def read_blocks(plan: Any, reach: Reach) -> int:
    start, end = plan.gap
    return int(plan.stage_disk_blocks + max(0, end - max(start, reach.host_blocks)))


@settings(max_examples=300, deadline=None)
@given(MODELS, REACHES, st.sampled_from(["cost", "cost", "flashgen", "threshold:512", "always", "never"]))
def test_every_plan_is_a_prefix_or_leaves_a_gap_within_its_room(model: CostModel, reach: Reach, name: str) -> None:
    plan = restore_strategy(name)(model, reach)
    assert 0 <= plan.load_host_blocks <= reach.host_blocks - reach.device_blocks
    assert 0 <= read_blocks(plan, reach) <= min(reach.disk_blocks - reach.host_blocks, reach.staging_room_blocks)
    assert plan.stage_disk_blocks == 0 or plan.load_host_blocks == reach.host_blocks - reach.device_blocks
    assert plan.stage_disk_blocks + plan.deferred_disk_blocks <= reach.disk_blocks - reach.host_blocks
    start, end = plan.gap
    assert plan.recompute_tokens == reach.prompt_tokens - 16 * (reach.device_blocks + split(plan) + end - start) >= 1
    assert name == "cost" or end == 0
    if end:
        assert plan.stage_disk_blocks == plan.deferred_disk_blocks == 0
        assert reach.device_blocks + plan.load_host_blocks < start < end <= reach.disk_blocks


# --- calibration


def test_the_fit_finds_the_numbers_that_made_the_samples() -> None:
    true = llama2_7b_on_a100().prefill
    fitted = fit_prefill((n, c, true.seconds(n, c)) for n in (64, 512, 2048) for c in (0, 1024, 8192))
    assert fitted.overhead_s == pytest.approx(true.overhead_s, rel=1e-6)
    assert fitted.per_token_s == pytest.approx(true.per_token_s, rel=1e-6)
    assert fitted.per_pair_s == pytest.approx(true.per_pair_s, rel=1e-6)
    decode = DecodeCost(0.02, 1e-4, 3e-7)
    found = fit_decode((b, b * c, decode.seconds(b, b * c)) for b in (1, 8, 32) for c in (128, 4096))
    assert found.per_context_token_s == pytest.approx(3e-7, rel=1e-6)
    link = fit_link((size * n, n, PINNED_PCIE4.seconds(size * n, n)) for size in (1 << 14, 1 << 20) for n in (1, 64))
    assert (link.bytes_per_s, link.per_copy_s) == (pytest.approx(26.7e9), pytest.approx(2.46e-6))


def test_the_fit_gives_no_negative_number_for_noisy_samples() -> None:
    fitted = fit_prefill([(16, 0, 0.030), (64, 0, 0.028), (256, 0, 0.031), (512, 0, 0.029)])
    assert min(fitted.overhead_s, fitted.per_token_s, fitted.per_pair_s) >= 0
    assert fitted.seconds(128) == pytest.approx(0.0295, rel=0.1)
    assert fit_link([(4096, 1, 1e-4), (8192, 1, 1e-4)]).bytes_per_s < math.inf
    with pytest.raises(ValueError, match="needs samples"):
        fit_prefill([])


def test_observations_correct_the_model_and_an_outlier_hardly_moves_it() -> None:
    model = llama2_7b_on_a100()
    for _ in range(60):
        model.prefill.observe(1024, 0, 2 * 0.0675)
        model.disk_read.observe(1 << 20, 1, 3 * LinkCost(3.5e9, 1e-4).seconds(1 << 20))
    assert model.prefill.seconds(4096) == pytest.approx(2 * 0.2575, rel=0.02)
    assert model.disk_read.scale == pytest.approx(3, rel=0.02)
    before = model.prefill.scale
    model.prefill.observe(1024, 0, 1000.0)
    assert model.prefill.scale / before < 1.08
    model.prefill.observe(0, 0, 1.0)
    model.prefill.observe(10, 0, 0.0)
    assert model.prefill.scale / before < 1.08


def test_a_model_survives_json() -> None:
    model = llama2_7b_on_a100()
    model.disk_read.observe(1 << 20, 1, 1.0)
    assert CostModel.from_dict(json.loads(json.dumps(model.to_dict()))) == model


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 9},
        {"prefill": None},
        {"prefill": {"overhead_s": 1}},
        {"disk_read": {"bytes_per_s": 0, "per_copy_s": 0, "scale": 1}},
        {"disk_read": {"bytes_per_s": float("nan"), "per_copy_s": 0, "scale": 1}},
        {"more": 1},
    ],
)
def test_a_damaged_calibration_is_refused_with_the_way_out(damage: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="calibrate again"):
        CostModel.from_dict(llama2_7b_on_a100().to_dict() | damage)
