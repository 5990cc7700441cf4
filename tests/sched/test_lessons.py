"""What makes other engines hang, leak or starve, under every order and way of preemption.

Reading a block that is being written, a flipped bit on disk and a restart are the disk store's
(`tests/cache/test_disk_store.py`, `tests/test_tiers.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from simulation import VOCAB, events_of, make_engine, make_tiered_engine, request

from jserve.engine import Engine
from jserve.sched import yielding
from jserve.sched.sequence import Phase
from jserve.simulated import expected_tokens

ORDERS = ["fcfs", "flashgen", "priority", "slo", "pace", "prefix"]
PREEMPTIONS = ["recompute", "swap", "auto"]
pytestmark = [pytest.mark.parametrize("order", ORDERS), pytest.mark.parametrize("preempt", PREEMPTIONS)]


def finish(engine: Engine, limit: int = 20_000) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {}
    for _ in range(limit):
        if not engine.has_work:
            break
        for output in engine.step():
            said.setdefault(output.request_id, []).extend(output.token_ids)
    else:
        raise AssertionError(f"it hangs: {engine.stats()}")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.held_blocks) == (0, 0, 0)
    assert not engine.scheduler.state.running.holders
    assert sorted(engine.scheduler.state.running.free_slots) == list(range(engine.config.sched.max_running))
    return said


def ask(engine: Engine, name: str, prompt: list[int], count: int) -> None:
    engine.add(request(name, prompt, count))
    assert finish(engine)[name] == expected_tokens(prompt, count, VOCAB)


def histories(engine: Engine) -> tuple[list[int], list[int]]:
    """Two that the host keeps, and that the device has forgotten."""
    first, second = list(range(33)), list(range(40, 73))
    for prompt in (first, second, [7] * 40, [8] * 40):
        ask(engine, f"before{prompt[0]}", prompt, 2)
    return first, second


def test_two_full_hits_as_large_as_the_pool_both_end(order: str, preempt: str) -> None:
    engine = make_tiered_engine(blocks=12, copy_s=0.01, order=order, preempt=preempt)
    first, second = histories(engine)
    engine.add(request("first", first, 12))
    engine.add(request("second", second, 12))
    said = finish(engine)
    assert said["first"] == expected_tokens(first, 12, VOCAB)
    assert said["second"] == expected_tokens(second, 12, VOCAB)


@pytest.mark.parametrize("kind", ["load", "store"])
def test_a_copy_that_never_ends_costs_its_deadline(order: str, preempt: str, kind: str) -> None:
    stuck = [False]
    copy_s: Callable[[str, int], float] = lambda k, n: 1e9 if stuck[0] and k == kind else 0.001 * n  # noqa: E731
    engine = make_tiered_engine(blocks=24, copy_s=copy_s, order=order, preempt=preempt, wait_limit_s=0.2)
    first, second = histories(engine)
    stuck[0] = True
    engine.add(request("first", first, 30))
    engine.add(request("second", second, 30))
    for _ in range(5_000):
        if {"first", "second"} <= {e.request_id for e in events_of(engine) if e.kind == "finished"}:
            break
        engine.step()
    assert engine.stats().requests_finished == 6
    assert engine.stats().held_blocks == 0


def test_a_copy_that_fails_once_costs_computation(order: str, preempt: str) -> None:
    failures = iter([True])
    armed = [False]
    engine = make_tiered_engine(
        blocks=14,
        copy_s=0.01,
        fails=lambda kind: armed[0] and kind == "load" and next(failures, False),
        order=order,
        preempt=preempt,
    )
    first, second = histories(engine)
    armed[0] = True
    for name, prompt in (("first", first), ("second", second), ("again", first)):
        ask(engine, name, prompt, 6)
    assert next(failures, None) is None, "it has failed"


STATES = ["queued", "prefill", "decode", "preempted", "swapped out", "loading"]


@pytest.mark.parametrize("state", STATES)
def test_cancelled_in_any_state_it_leaves_nothing(order: str, preempt: str, state: str) -> None:
    engine = make_tiered_engine(blocks=40, budget=8, max_running=2, copy_s=0.05, order=order, preempt=preempt)
    first, _ = histories(engine)
    scheduler = engine.scheduler
    if state == "queued":
        engine.add(request("x", [1] * 20, 20))
    elif state == "loading":
        engine.cache.pool.release(engine.cache.pool.allocate(40) or [])  # the device forgets all
        engine.add(request("x", first, 20))
        engine.step()
        assert [s.phase for s in scheduler.state.running.holders] == [Phase.LOADING]
    else:
        engine.add(request("x", list(range(50, 90)), 20))
        for _ in range(3 if state == "prefill" else 9):
            engine.step()
        (sequence,) = scheduler.running
        assert (sequence.num_output > 0) == (state != "prefill")
        if state in ("preempted", "swapped out"):
            scheduler.state.swaps = lambda decision: state == "swapped out"
            yielding.preempt(scheduler.state, sequence, sequence)
            assert not sequence.table.blocks
    engine.abort("x")
    finish(engine)
    assert not engine.cache.tiers.restores  # type: ignore[attr-defined]
    ask(engine, "afterwards", [3] * 30, 5)


def test_a_stream_of_small_requests_does_not_starve_a_large_one(order: str, preempt: str) -> None:
    engine = make_tiered_engine(blocks=32, budget=64, max_running=8, order=order, preempt=preempt)
    engine.add(request("first", [1] * 60, 20))
    engine.step()
    engine.add(request("large", list(range(90)), 20))
    ended: dict[str, int] = {}
    for step in range(400):
        engine.add(request(f"small{step}", [step % VOCAB, 5, 6], 12))
        for output in engine.step():
            if output.finish_reason:
                ended[output.request_id] = step
    assert ended["large"] <= ended["first"] + 30
    finish(engine)


def test_a_head_that_waits_is_never_overtaken_by_more_than_can_be_preempted(order: str, preempt: str) -> None:
    engine = make_engine(blocks=32, budget=64, max_running=8, reuse=True, order=order, preempt=preempt)
    engine.add(request("first", [1] * 60, 20))
    engine.step()
    engine.add(request("large", list(range(90)), 20))
    scheduler, cache = engine.scheduler, engine.cache
    for step in range(15):
        engine.add(request(f"small{step}", [step, 5, 6], 12))
        engine.step()
        large = next((s for s in scheduler.waiting if s.request_id == "large"), None)
        if large is not None:
            everybody = [s.table for s in scheduler.state.running.holders if s.rank > large.rank]
            first = [s.table for s in scheduler.state.running.holders if s.rank < large.rank]
            assert cache.fits(large.table, large.tokens, without=[*everybody, *first])
            assert not cache.fits(large.table, large.tokens, len(first), without=everybody)
    finish(engine)
