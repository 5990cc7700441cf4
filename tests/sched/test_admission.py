"""Who may join the queue: its bounds, the shares of tenants, and the time that a first token would take."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import events_of, make_engine, request

from jserve.config import CacheConfig, EngineConfig, SchedConfig
from jserve.engine import Engine
from jserve.errors import ConfigError, InvalidRequest, Overloaded
from jserve.request import Terms
from jserve.sched.admission import Bounds, FairShares, Load, predicted_ttft_s, refusal

MODEL = Path(__file__).parents[1] / "fixtures" / "models" / "smollm2"
BOUNDS = Bounds(requests=10, tokens=1000)


def finish(engine: Engine) -> list[str]:
    """The requests in the order in which they ended."""
    for _ in range(10_000):
        if not engine.has_work:
            return [e.request_id for e in events_of(engine) if e.kind == "finished"]
        engine.step()
    raise AssertionError("it never ends")


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (Load(10, 4, 0, 5), "6 requests are waiting"),
        (Load(2, 2, 990, 11), "990 tokens are waiting, and with the 11 of this prompt"),
        (Load(6, 2, 0, 5, tenant_requests=5, share=0.5), r"this tenant has 5 requests open.*\(50% of 10\)"),
        (Load(2, 2, 0, 5, prefill_s=0.5, queued_prefill_s=1.0, limit_s=1.4), "predicted in 1.5 s, and due in 1.4 s"),
        (Load(2, 2, 0, 5, missing_blocks=30, freed_blocks_per_s=10, limit_s=2), "predicted in 3 s"),
    ],
)
def test_each_bound_says_what_it_is_and_when_to_retry(load: Load, reason: str) -> None:
    refused = refusal(load, BOUNDS)
    assert refused is not None
    assert re.search(reason, refused.reason)
    assert refused.retry_after_s > 0
    assert refused.predicted_ttft_s == predicted_ttft_s(load)


@pytest.mark.parametrize(
    "load",
    [
        Load(9, 4, 0, 5),
        Load(2, 2, 989, 11),
        Load(4, 2, 0, 5, tenant_requests=4, share=0.1),  # the queue is not crowded
        Load(6, 2, 0, 5, tenant_requests=4, share=0.5),
        Load(2, 2, 0, 5, prefill_s=0.5, queued_prefill_s=1.0, limit_s=1.6),
        Load(2, 2, 0, 5, prefill_s=9.0),  # nobody said when it is due
        Load(2, 2, 0, 5, missing_blocks=30, limit_s=2),  # and nobody knows when blocks come free
    ],
)
def test_within_the_bounds_it_is_taken(load: Load) -> None:
    assert refusal(load, BOUNDS) is None


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    shares = FairShares()
    places = [shares.take_place("", tokens) for tokens in (5, 500, 1, 70, 5)]
    assert places == sorted(places)
    assert len(set(places)) == 5


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=60), st.integers(1, 5))
def test_who_competes_is_served_by_weight(arrivals: list[str], weight: int) -> None:
    """Whatever the order of arrival: while both wait, a is served `weight` times for each time of b, or about that."""
    shares = FairShares({"a": weight})
    queue = sorted((shares.take_place(tenant, 10), i, tenant) for i, tenant in enumerate(arrivals))
    served: Counter[str] = Counter()
    left = Counter(arrivals)
    for _, _, tenant in queue:
        served[tenant] += 1
        left[tenant] -= 1
        if left["a"] and left["b"]:
            assert abs(served["a"] / weight - served["b"]) <= 2


def test_a_tenant_that_was_idle_has_saved_nothing_up() -> None:
    shares = FairShares()
    for _ in range(100):
        shares.serve(shares.take_place("busy", 10))
    assert shares.place("idle") >= 98


def test_a_flood_of_one_tenant_does_not_keep_another_waiting() -> None:
    engine = make_engine(max_running=1, budget=64, max_waiting=1000)
    for i in range(20):
        engine.add(request(f"flood{i}", [i, 1, 2], 5, terms=Terms(tenant="flood")))
    engine.step()
    engine.add(request("quiet", [50, 1, 2], 5, terms=Terms(tenant="quiet")))
    assert finish(engine).index("quiet") <= 2


def test_weights_share_the_server() -> None:
    engine = make_engine(max_running=1, budget=64, tenant_weights=("gold=3",))
    for i in range(12):
        for tenant in ("iron", "gold"):
            engine.add(request(f"{tenant}{i}", [i, 1, 2], 5, terms=Terms(tenant=tenant)))
    ended = finish(engine)
    assert 8 <= sum(name.startswith("gold") for name in ended[:12]) <= 10


def test_a_tenant_cannot_fill_the_queue_of_others() -> None:
    engine = make_engine(max_running=2, max_waiting=6, budget=64, tenant_weights=("other=1",))
    for i in range(4):
        engine.add(request(f"r{i}", [i], 5))
    with pytest.raises(Overloaded, match=r"this tenant has 4 requests open.*50% of 8"):
        engine.add(request("r4", [4], 5))
    for i in range(4):
        engine.add(request(f"other{i}", [i], 5, terms=Terms(tenant="other")))
    with pytest.raises(Overloaded, match="6 requests are waiting"):
        engine.add(request("third", [1], 5, terms=Terms(tenant="third")))
    assert len(finish(engine)) == 8


def test_the_tokens_of_the_queue_are_bounded() -> None:
    engine = make_engine(max_running=1, budget=64, max_waiting_tokens=50)
    engine.add(request("a", [1] * 30, 5))
    with pytest.raises(Overloaded, match="30 tokens are waiting, and with the 21") as refused:
        engine.add(request("b", [1] * 21, 5))
    assert refused.value.retry_after_s is not None
    engine.step()
    engine.add(request("b", [1] * 21, 5))
    assert finish(engine) == ["a", "b"]
    assert engine.scheduler.waiting_tokens == 0


def test_who_would_have_its_first_token_too_late_is_refused_at_once_with_the_prediction() -> None:
    engine = make_engine(blocks=400, budget=64, max_running=4)
    engine.add(request("a", list(range(90)) * 2, 2))
    finish(engine)
    for i in range(5):
        engine.add(request(f"ahead{i}", [i] * 128, 2))
    # A step takes 10 ms and 64 tokens, and 640 tokens are ahead.
    with pytest.raises(Overloaded, match=r"predicted in 0.1\d* s, and due in 0.05 s") as refused:
        engine.add(request("late", [9] * 64, 2, terms=Terms(slo_ttft_s=0.05)))
    assert refused.value.predicted_ttft_s == pytest.approx(0.11, rel=0.1)
    assert refused.value.retry_after_s == pytest.approx(0.1), "the excess, and no less than this"
    with pytest.raises(Overloaded):
        engine.add(request("late", [9] * 64, 2, deadline_s=0.05))
    engine.add(request("early", [9] * 64, 2, terms=Terms(slo_ttft_s=0.5)))
    assert finish(engine)[-1] == "early"
    rejected = [e for e in events_of(engine) if e.kind == "rejected"]
    assert [e.request_id for e in rejected] == ["late", "late"]
    assert "predicted" in rejected[0].detail


def test_a_request_of_high_priority_is_not_refused_for_those_behind_it() -> None:
    engine = make_engine(blocks=400, budget=64, max_running=4, order="priority")
    engine.add(request("a", list(range(90)) * 2, 2))
    finish(engine)
    for i in range(5):
        engine.add(request(f"low{i}", [i] * 128, 2))
    engine.add(request("high", [9] * 64, 2, terms=Terms(slo_ttft_s=0.05, priority=5)))
    assert finish(engine)[1] == "high"


def test_without_predictions_nobody_is_refused_for_lateness() -> None:
    engine = make_engine(blocks=400, budget=64, max_running=4, admission="queue")
    engine.add(request("a", list(range(90)) * 2, 2))
    finish(engine)
    engine.add(request("late", [9] * 640, 2, terms=Terms(slo_ttft_s=0.001)))
    assert finish(engine)[-1] == "late"


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (Terms(priority=101), "priority is 101: use a whole number from -100 to 100"),
        (Terms(priority=-101), "priority is -101"),
        (Terms(slo_ttft_s=0.0), "slo_ttft_s is 0.0: use a number above 0"),
        (Terms(slo_ttft_s=float("nan")), "slo_ttft_s is nan"),
        (Terms(slo_tpot_s=-1.0), "slo_tpot_s is -1.0"),
        (Terms(tenant="x" * 257), "tenant has 257 characters: use at most 256"),
        (Terms(slo_ttft_s=9.0), "slo_ttft_s is 9, and the call's deadline is in 5 s"),
        (Terms(priority=1.5), "terms of the request cannot be read"),  # type: ignore[arg-type]
    ],
)
def test_terms_that_cannot_be_served_are_refused(terms: Terms, message: str) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest, match=message):
        engine.add(request("a", [1], 1, terms=terms, deadline_s=5.0))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "lifo"}, "sched.order is 'lifo': use one of fcfs, flashgen"),
        ({"victim": "oldest"}, "sched.victim is 'oldest': use one of youngest"),
        ({"preempt": "discard"}, "sched.preempt is 'discard': use one of recompute"),
        ({"chunk": "large"}, "sched.chunk is 'large': use one of static, adaptive"),
        ({"admission": "open"}, "sched.admission is 'open': use one of queue, predict"),
        ({"slo_ttft_s": 0.0}, "sched.slo_ttft_s is 0.0: use more than 0"),
        ({"slo_ttft_s": 0.1, "slo_tpot_s": 0.2}, "sched.slo_tpot_s is 0.2: a first token takes a step too"),
        ({"max_waiting_tokens": 0}, "sched.max_waiting_tokens is 0"),
        ({"promote_tokens": -1}, "sched.promote_tokens is -1: use 0 or more"),
        ({"tenant_weights": ("a",)}, "sched.tenant_weights is 'a': use NAME=WEIGHT"),
        ({"tenant_weights": ("a=0",)}, "tenant_weights is 'a=0'"),
        ({"tenant_weights": ("a=1", "a=2")}, "tenant_weights is 'a=2'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_start_up(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedConfig(**settings)


def test_a_budget_smaller_than_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="token_budget is 8: it is smaller than a block of 16 tokens"):
        EngineConfig(cache=CacheConfig(block_size=16), sched=SchedConfig(max_running=4, token_budget=8))


@pytest.mark.parametrize(("platform", "block"), [("cpu", 8), ("gpu", 16)])
def test_so_is_one_smaller_than_the_block_that_the_platform_likes(platform: str, block: int) -> None:
    config = EngineConfig(sched=SchedConfig(max_running=4, token_budget=7))
    with pytest.raises(ConfigError, match=f"token_budget is 7: it is smaller than a block of {block} tokens"):
        config.block_and_budget(platform)


def test_it_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jserve.checkpoints.load", lambda *args, **more: pytest.fail("the weights are being loaded"))
    config = EngineConfig(model=str(MODEL), sched=SchedConfig(max_running=4, token_budget=4))
    with pytest.raises(ConfigError, match="token_budget is 4"):
        Engine.from_config(config)


def test_there_is_nothing_to_swap_to_without_a_host_tier() -> None:
    with pytest.raises(ConfigError, match="preempt is 'swap', and there is no host tier"):
        Engine.from_config(EngineConfig(sched=SchedConfig(preempt="swap")))
