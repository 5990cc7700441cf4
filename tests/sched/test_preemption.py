"""Who yields gives back no more than is needed, and comes back by itself: computed again, or from the host."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import VOCAB, events_of, make_engine, make_tiered_engine, request, workload

from jserve.cache.kv_cache import BlockTable
from jserve.engine import Engine
from jserve.errors import ConfigError
from jserve.request import Terms
from jserve.sched.preemption import preemption_named
from jserve.sched.scheduler import Scheduler
from jserve.sched.yielding import preempt
from jserve.simulated import expected_tokens


def run(engine: Engine, until: int | None = None) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {}
    for step in range(50_000):
        if not engine.has_work or step == until:
            return said
        for output in engine.step():
            said.setdefault(output.request_id, []).extend(output.token_ids)
    raise AssertionError(f"it never ends: {engine.stats()}")


def preempt_somebody(scheduler: Scheduler, rng: random.Random) -> bool:
    """As a decode or an admission would, at a moment when none has to."""
    if not scheduler.state.running.holders:
        return False
    victim = rng.choice(scheduler.state.running.holders)
    preempt(scheduler.state, victim, victim)
    return True


def test_only_the_tail_that_is_needed_is_lost_and_only_it_is_computed_again() -> None:
    engine = make_engine(blocks=16, block_size=4, budget=64, reuse=True)
    engine.add(request("old", list(range(20)), 20))  # 5 blocks, 10 in the end
    engine.add(request("young", list(range(40, 72)), 6))  # 8 blocks, 10 in the end
    said = run(engine)
    assert said["young"] == expected_tokens(list(range(40, 72)), 6, VOCAB)
    (preempted,) = [e for e in events_of(engine) if e.kind == "preempted"]
    assert (preempted.request_id, preempted.by) == ("young", None)
    assert preempted.detail == "recompute, 9 blocks given back: none is left for its next token"
    (resumed,) = [e for e in events_of(engine) if e.kind == "resumed"]
    assert resumed.detail == "24 of 37 tokens are cached: 24 on the device", "the old one has taken three of its nine"


def test_who_yields_a_slot_alone_loses_nothing() -> None:
    engine = make_engine(blocks=64, block_size=4, max_running=1, budget=64, reuse=True, order="priority")
    engine.add(request("low", list(range(21)), 30))
    run(engine, until=3)
    engine.add(request("high", list(range(30, 40)), 3, terms=Terms(priority=1)))
    run(engine)
    (preempted,) = [e for e in events_of(engine) if e.kind == "preempted"]
    assert (preempted.request_id, preempted.by) == ("low", "high")
    (resumed,) = [e for e in events_of(engine) if e.kind == "resumed"]
    assert resumed.detail == "20 of 24 tokens are cached: 20 on the device"
    assert [e.request_id for e in events_of(engine) if e.kind == "finished"] == ["high", "low"]


def test_what_a_preempted_one_has_given_back_serves_others_meanwhile() -> None:
    engine = make_engine(blocks=40, block_size=8, budget=256, reuse=True)
    for name, prompt, answer in (("a", 76, 80), ("big", 223, 20), ("small", 37, 100)):
        engine.add(request(name, [len(name)] * prompt, answer))
    run(engine)
    events = [(e.kind, e.request_id) for e in events_of(engine)]
    assert events.index(("promoted", "small")) < events.index(("finished", "a"))


def test_what_was_swapped_out_is_loaded_and_not_computed() -> None:
    engine = make_tiered_engine(blocks=14, budget=64, preempt="swap")
    engine.add(request("old", list(range(24)), 30))
    engine.add(request("young", list(range(40, 64)), 8))
    said = run(engine)
    assert said["young"] == expected_tokens(list(range(40, 64)), 8, VOCAB)
    assert engine.scheduler.stats.swaps == engine.stats().preemptions > 0
    stats = engine.cache.stats()
    assert stats["swapped_blocks"] > 0


def test_auto_follows_the_cost_model() -> None:
    for load_s, swaps in ((1e-9, True), (10.0, False)):
        engine = make_tiered_engine(blocks=14, budget=64, preempt="auto", block_copy_s=load_s)
        engine.add(request("old", list(range(24)), 30))
        engine.add(request("young", list(range(40, 64)), 8))
        run(engine)
        assert engine.stats().preemptions > 0
        assert (engine.scheduler.stats.swaps > 0) == swaps


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="'discard': use one of recompute, swap, auto"):
        preemption_named("discard")


WORLDS = st.fixed_dictionaries(
    {
        "blocks": st.integers(10, 40),
        "max_running": st.integers(1, 6),
        "budget": st.integers(8, 40),
        "overlap": st.booleans(),
        "preempt": st.sampled_from(["recompute", "swap", "auto"]),
        "order": st.sampled_from(["flashgen", "fcfs", "prefix", "priority", "slo", "pace"]),
        "victim": st.sampled_from(["youngest", "largest", "cheapest"]),
        "chunk": st.sampled_from(["static", "adaptive"]),
    }
)


@settings(max_examples=150, deadline=None)
@given(WORLDS, st.booleans(), st.integers(0, 2**32), st.integers(1, 8))
def test_preempted_anywhere_a_request_says_the_same(world: dict, tiered: bool, seed: int, requests: int) -> None:
    rng = random.Random(seed)
    if tiered:
        engine = make_tiered_engine(**world, copy_s=rng.choice([0.0, 0.02]), host=rng.choice([4, 40]))
    else:
        engine = make_engine(**world, reuse=rng.random() < 0.7)
    arrivals = workload(seed, requests, engine.max_total_tokens, terms_too=True)
    said: dict[str, list[int]] = {}
    todo, forced = list(arrivals), 0
    for _ in range(50_000):
        if todo and rng.random() < 0.3:
            engine.add(todo.pop(0).request)
        elif forced < 10 and rng.random() < 0.05:
            forced += preempt_somebody(engine.scheduler, rng)
        if not engine.has_work and not todo:
            break
        for output in engine.step():
            said.setdefault(output.request_id, []).extend(output.token_ids)
    else:
        raise AssertionError("it never ends")
    assert said == {a.request.request_id: a.answer for a in arrivals}
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.held_blocks) == (0, 0, 0)
    assert sorted(engine.scheduler.state.running.free_slots) == list(range(world["max_running"]))


def test_one_that_was_loaded_and_yields_in_the_same_step_is_not_set_up() -> None:
    load_s = [0.0]
    copy_s: Callable[[str, int], float] = lambda kind, blocks: load_s[0] if kind == "load" else 0.0  # noqa: E731
    engine = make_tiered_engine(blocks=24, max_running=4, budget=64, overlap=True, copy_s=copy_s, wait_limit_s=5.0)
    conversation = list(range(24))
    for name, prompt, answer in (("warm", conversation, 1), ("flood", [60 - i % 50 for i in range(90)], 2)):
        engine.add(request(name, prompt, answer))
        run(engine)
    load_s[0] = 0.02
    for name, prompt, answer in (*((n, [70], 2) for n in "XYZ"), ("A", [71], 60)):
        engine.add(request(name, prompt, answer))
    run(engine, until=8)
    engine.add(request("C", [72] * 40, 2))
    run(engine, until=1)
    engine.add(request("H", [73] * 60, 3))
    engine.add(request("S", [*conversation, 1], 5))
    run(engine)  # the executor asserts that whom it sets up has a place in the batch
    assert {"loaded S", "preempted S"} <= {f"{e.kind} {e.request_id}" for e in events_of(engine)}


def test_later_decodes_that_fill_a_step_do_not_hold_up_an_earlier_prompt() -> None:
    engine = make_engine(blocks=64, max_running=4, budget=4, order="priority")
    for i in range(4):
        engine.add(request(f"later{i}", [i], 60))
    run(engine, until=6)
    engine.add(request("H", [9, 9, 9], 3, terms=Terms(priority=1)))
    run(engine, until=6)
    assert ("finished", "H") in [(e.kind, e.request_id) for e in events_of(engine)]


@pytest.mark.parametrize("device_reuse", [False, True])
def test_what_a_victim_alone_holds_of_a_shared_prefix_counts_only_where_the_device_keeps_it(device_reuse: bool) -> None:
    """Two have computed the same prompt at once: the first block that is found is the victim's, the others are not."""
    cache = make_tiered_engine(blocks=10, block_size=4, device_reuse=device_reuse).cache
    prompt = list(range(17))
    victim, other, newcomer = (BlockTable(b"root") for _ in range(3))
    for table in (victim, other):
        assert cache.admit(table, prompt) is not None
    cache.publish(victim, prompt, 4)
    cache.publish(other, prompt, 16)
    fits = cache.fits(newcomer, prompt, 1, [victim])
    assert fits == device_reuse, "five blocks are free then: two are enough, or all five are needed"
    cache.release(victim)
    assert (cache.admit(newcomer, prompt, 1) is not None) == fits
