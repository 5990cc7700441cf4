"""FlashGen-Sched: later requests overtake one that does not fit, and never delay it (FlashGen §4.2 to §4.4)."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Arrival, events_of, make_engine, play, request, workload

from jserve.cache.kv_cache import Admission, BlockTable
from jserve.engine import Engine
from jserve.sched import filling
from jserve.sched.plan import StepPlan
from jserve.sched.scheduler import Scheduler
from jserve.sched.sequence import Phase, Sequence
from jserve.sched.state import State


def tokens(count: int) -> list[int]:
    return list(range(count))


def story(engine: Engine, *kinds: str) -> list[str]:
    return [f"{e.kind} {e.request_id}" + (f" by {e.by}" if e.by else "") for e in events_of(engine) if e.kind in kinds]


def finish(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError(f"it never ends: {engine.stats()}")


def test_a_request_that_fits_runs_past_the_head_and_yields_when_the_head_fits() -> None:
    engine = make_engine(blocks=16, block_size=4, budget=64, order="flashgen")
    engine.add(request("first", tokens(36), 4))  # 10 blocks
    engine.add(request("head", tokens(44), 2))  # 12 blocks: only once the first has ended
    engine.add(request("small", tokens(8), 40))  # 2 blocks now, 12 in the end
    finish(engine)
    assert story(engine, "promoted", "preempted", "resumed", "finished") == [
        "promoted small by head",
        "finished first",
        "finished head",
        "finished small",
    ], "the head fits beside it"

    engine = make_engine(blocks=16, block_size=4, budget=64, order="flashgen")
    engine.add(request("first", tokens(36), 4))
    engine.add(request("head", tokens(56), 2))  # 15 blocks: not beside the small one
    engine.add(request("small", tokens(8), 40))
    finish(engine)
    assert story(engine, "promoted", "preempted", "resumed", "finished") == [
        "promoted small by head",
        "finished first",
        "preempted small by head",
        "finished head",
        "resumed small",
        "finished small",
    ]


def test_in_order_of_arrival_alone_nobody_passes() -> None:
    engine = make_engine(blocks=16, block_size=4, budget=64, order="fcfs")
    for name, length, answer in (("first", 36, 4), ("head", 56, 2), ("small", 8, 40)):
        engine.add(request(name, tokens(length), answer))
    finish(engine)
    assert story(engine, "promoted", "preempted", "finished") == ["finished first", "finished head", "finished small"]


@pytest.mark.parametrize("order", ["fcfs", "flashgen"])
def test_when_the_head_is_cancelled_the_next_one_starts_at_once(order: str) -> None:
    engine = make_engine(blocks=16, block_size=4, budget=64, order=order)
    for name, length, answer in (("first", 36, 20), ("head", 56, 2), ("small", 8, 4)):
        engine.add(request(name, tokens(length), answer))
    engine.step()
    engine.abort("head")
    engine.step()
    assert [s.request_id for s in engine.scheduler.running] == ["first", "small"]


def test_only_as_many_as_needed_yield_and_the_youngest_first() -> None:
    engine = make_engine(blocks=20, block_size=4, budget=64, order="flashgen")
    engine.add(request("first", tokens(40), 4))  # 11 blocks
    engine.add(request("head", tokens(48), 2))  # 13
    for name in ("p1", "p2", "p3"):
        engine.add(request(name, tokens(7), 30))  # 2 each, and then more
    for _ in range(3):
        engine.step()
    assert story(engine, "promoted") == [f"promoted {p} by head" for p in ("p1", "p2", "p3")]
    finish(engine)
    preempted = [line for line in story(engine, "preempted") if line.endswith("by head")]
    assert preempted == ["preempted p3 by head"]


def test_where_making_room_costs_the_head_what_it_had_elsewhere_it_starts_as_soon_as_it_fits_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A victim that is swapped out may evict from the host what the head's prefix needed of it."""
    engine = make_engine(blocks=20, block_size=4, budget=64, order="flashgen")
    engine.add(request("first", tokens(40), 4))
    engine.add(request("head", tokens(48), 2))
    for name in ("p1", "p2", "p3"):
        engine.add(request(name, tokens(7), 30))
    admit = engine.cache.admit
    lost = []

    def admit_later(table: BlockTable, token_ids: list[int], spare: int = 0) -> Admission | None:
        if len(token_ids) == 48 and not lost:
            lost.append("head")
            return None
        return admit(table, token_ids, spare)

    monkeypatch.setattr(engine.cache, "admit", admit_later)
    finish(engine)
    assert lost
    assert "preempted p3 by head" in story(engine, "preempted")
    assert [line for line in story(engine, "admitted", "resumed") if "head" in line] == ["admitted head"]


def test_where_an_older_one_has_to_yield_a_younger_one_that_is_then_not_needed_goes_on() -> None:
    engine = make_engine(blocks=40, block_size=4, budget=128, order="flashgen")
    engine.add(request("first", tokens(60), 4))  # 16 blocks
    engine.add(request("head", [91] * 132, 2))  # 34: with what the large one holds, and not with the small one's
    engine.add(request("large", tokens(68), 30))  # 17 blocks, and then more
    engine.add(request("small", tokens(4), 30))
    finish(engine)
    assert story(engine, "promoted") == ["promoted large by head", "promoted small by head"]
    assert story(engine, "preempted") == ["preempted large by head"]


def test_who_has_much_to_compute_may_be_told_not_to_pass() -> None:
    engine = make_engine(blocks=24, block_size=4, budget=64, reuse=True, order="flashgen", promote_tokens=8)
    engine.add(request("before", tokens(16), 1))
    finish(engine)
    engine.add(request("first", [90] * 36, 4))
    engine.add(request("head", [91] * 76, 2))
    engine.add(request("long", [92] * 9, 4))
    engine.add(request("short", [93] * 8, 4))
    engine.add(request("cached", tokens(24), 4))  # 16 of its tokens need not be computed
    finish(engine)
    assert story(engine, "promoted") == ["promoted short by head", "promoted cached by head"]


@pytest.mark.parametrize(("first", "starts"), [(65, True), (100, False)])
def test_a_block_is_spared_for_each_before_it_that_soon_takes_another(first: int, starts: bool) -> None:
    """With 28 tokens left in its last block it soon does, with 63 it does not."""
    engine = make_engine(blocks=4, block_size=64, budget=256, order="flashgen")
    engine.add(request("first", [1] * first, 60))
    engine.add(request("second", [2] * 120, 4))
    engine.step()
    assert [s.request_id for s in engine.scheduler.running] == ["first", "second"][: 1 + starts]
    finish(engine)


def test_blocks_that_others_hold_too_free_nothing() -> None:
    """Two promoted ones share their prompt: each alone frees little, and together they free it."""
    engine = make_engine(blocks=20, block_size=4, budget=64, reuse=True, order="flashgen")
    engine.add(request("first", [90] * 41, 3))  # 11 blocks
    engine.add(request("head", tokens(60), 2))  # 16
    for name in ("p1", "p2"):
        engine.add(request(name, [5] * 24, 12))  # 6 blocks, of which 5 are shared
    finish(engine)
    assert [line for line in story(engine, "preempted") if line.endswith("by head")] == [
        "preempted p2 by head",
        "preempted p1 by head",
    ]


def test_a_slot_is_given_back_too() -> None:
    engine = make_engine(blocks=16, block_size=4, max_running=2, budget=64, order="flashgen")
    engine.add(request("first", tokens(36), 4))
    engine.add(request("head", tokens(40), 2))
    engine.add(request("small", tokens(4), 40))
    finish(engine)
    assert story(engine, "finished")[-1] == "finished small"


WORLDS = st.fixed_dictionaries(
    {
        "blocks": st.integers(8, 60),
        "block_size": st.sampled_from([1, 2, 4, 7]),
        "max_running": st.integers(1, 8),
        "budget": st.integers(8, 64),
        "overlap": st.booleans(),
        "order": st.sampled_from(["flashgen", "flashgen", "prefix", "pace", "fcfs"]),
        "turn_tokens": st.integers(1, 8),
        "ahead_s": st.sampled_from([0.0, 0.5, 3.0]),
        "victim": st.sampled_from(["youngest", "youngest", "largest", "cheapest"]),
    }
)
SEEDS = st.integers(0, 2**32)


def arrivals_for(world: dict[str, Any], seed: int, requests: int) -> list[Arrival]:
    return workload(seed, requests, min(80, world["blocks"] * world["block_size"]))


def watch(engine: Engine) -> list[int]:
    """Check each step's plan as it is made. Returns a list that holds the steps so far."""
    scheduler, schedule = engine.scheduler, engine.scheduler.schedule
    steps: list[int] = []

    def checked(max_steps: int = 1) -> StepPlan | None:
        plan = schedule(max_steps)
        steps.append(len(steps))
        assert_blocks_are_conserved(scheduler)
        assert_plan_is_sound(scheduler, plan)
        assert_nobody_waits_who_could_run(scheduler, plan)
        return plan

    scheduler.schedule = checked  # type: ignore[method-assign]
    return steps


def assert_blocks_are_conserved(scheduler: Scheduler) -> None:
    pool = scheduler.cache.pool
    holders = scheduler.running + scheduler.loading
    held = Counter(block for s in holders for block in s.table.blocks)
    assert set(holders) == set(scheduler.state.running.holders)
    assert not any(s.table.blocks for s in scheduler.waiting)
    assert [s.rank for s in scheduler.state.running.holders] == sorted(s.rank for s in scheduler.state.running.holders)
    assert scheduler.num_running == len(scheduler.running)
    assert all(pool.ref_count(block) == held[block] for block in range(pool.num_blocks))
    assert pool.num_free == pool.num_blocks - len(held)


def assert_plan_is_sound(scheduler: Scheduler, plan: StepPlan | None) -> None:
    if plan is None:
        return
    assert plan.num_tokens == sum(row.count for row in plan.rows) <= scheduler.token_budget
    assert len({row.sequence for row in plan.rows}) == len(plan.rows)
    assert all(row.sequence.phase is Phase.RUNNING and row.count > 0 for row in plan.rows)
    assert [row.sequence.rank for row in plan.rows[: plan.num_decodes]] == sorted(
        row.sequence.rank for row in plan.rows[: plan.num_decodes]
    )


def assert_nobody_waits_who_could_run(scheduler: Scheduler, plan: StepPlan | None) -> None:
    """Work conservation, and the invariant itself: what stands behind a request never keeps it waiting."""
    if plan is not None and plan.num_tokens >= scheduler.token_budget:
        return
    for waiting in scheduler.waiting:
        behind = [s for s in scheduler.state.running.holders if s.rank > waiting.rank]
        ahead = len(scheduler.state.running.holders) - len(behind)
        # A token of one that has just been preempted is in flight; who has been woken is looked at in the next step.
        if not waiting.in_flight and waiting not in scheduler.cache.index.woken:
            slot = bool(scheduler.state.running.free_slots or behind)
            spare = scheduler.state.running.spare(ahead)
            fits = scheduler.cache.fits(waiting.table, waiting.tokens, spare, [s.table for s in behind])
            assert not (slot and fits), f"{waiting.request_id} could run"
        if not scheduler.state.order.passes:
            return


@settings(max_examples=200, deadline=None)
@given(WORLDS, SEEDS, st.integers(1, 20), st.booleans())
def test_nobody_ever_waits_for_a_later_one_and_the_device_is_never_idle_for_nothing(
    world: dict[str, Any], seed: int, requests: int, reuse: bool
) -> None:
    engine = make_engine(**world, reuse=reuse)
    watch(engine)
    arrivals = arrivals_for(world, seed, requests)
    run = play(engine, arrivals)
    assert run.tokens == {a.request.request_id: a.answer for a in arrivals}
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.held_blocks) == (0, 0, 0)


@settings(max_examples=100, deadline=None)
@given(WORLDS, SEEDS, st.integers(2, 12))
def test_every_token_comes_when_it_would_if_later_requests_had_never_come(
    world: dict[str, Any], seed: int, requests: int
) -> None:
    """To the step, where the token budget is no matter: in a smaller one, chunks leave room for later decodes."""
    world |= {"order": "flashgen", "victim": "youngest", "budget": 10_000, "overlap": False}
    arrivals = arrivals_for(world, seed, requests)
    together = play(make_engine(**world), arrivals)
    for i, arrival in enumerate(arrivals):
        alone = play(make_engine(**world), arrivals[: i + 1])
        name = arrival.request.request_id
        assert together.token_steps[name] == alone.token_steps[name]


@settings(max_examples=200, deadline=None)
@given(WORLDS, SEEDS, st.integers(2, 20))
def test_the_delay_against_the_order_of_arrival_is_bounded(world: dict[str, Any], seed: int, requests: int) -> None:
    """At the latest when all before it have ended, a request runs to its end, after the work of one preemption."""
    arrivals = arrivals_for(world, seed, requests)
    fcfs = play(make_engine(**(world | {"order": "fcfs"})), arrivals)
    flashgen = play(make_engine(**(world | {"order": "flashgen"})), arrivals)
    before = 0
    for arrival in arrivals:
        name, answer = arrival.request.request_id, len(arrival.answer)
        before = max(before, fcfs.token_steps[name][-1])
        chunk = max(1, world["budget"] - world["max_running"])
        again = -(-(len(arrival.request.token_ids) + answer) // chunk) + 1
        assert flashgen.token_steps[name][-1] <= before + answer + again


@settings(max_examples=30, deadline=None)
@given(WORLDS, SEEDS, st.integers(1, 20))
def test_the_same_workload_gives_the_same_decisions(world: dict[str, Any], seed: int, requests: int) -> None:
    arrivals = arrivals_for(world, seed, requests)
    first, second = (play(make_engine(**world), arrivals) for _ in range(2))
    assert first.events == second.events
    assert first.token_steps == second.token_steps


@settings(max_examples=60, deadline=None)
@given(WORLDS, SEEDS, st.integers(2, 20))
def test_whoever_yields_for_another_is_needed_and_together_they_are_enough(
    world: dict[str, Any], seed: int, requests: int
) -> None:
    engine = make_engine(**world, reuse=True)
    state, chosen = engine.scheduler.state, filling.victims

    def checked(state: State, sequence: Sequence, spare: int) -> list[Sequence] | None:
        yielding = chosen(state, sequence, spare)
        for left_out in [None, *(yielding or [])[:-1]]:
            tables = [s.table for s in yielding or [] if s is not left_out]
            fits = state.cache.fits(sequence.table, sequence.tokens, spare, tables)
            assert fits == (left_out is None and yielding is not None)
        return yielding

    rng = random.Random(seed)
    arrivals = arrivals_for(world, seed, requests)
    for arrival in arrivals:  # half of them begin alike
        if rng.random() < 0.5:
            arrival.request.token_ids[: len(arrival.request.token_ids)] = tokens(len(arrival.request.token_ids))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "victims", checked)
        play(engine, arrivals)
    assert not state.running.holders
