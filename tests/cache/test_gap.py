"""A prompt that is computed from its front while the end of its prefix is brought from host and disk."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from tiers_world import BLOCK, VOCAB, World, prompt_of, with_gaps

from jserve.cache.cost import CostModel, Reach, RestorePlan, Strategy, always_load, never_load
from jserve.cache.staging import READS_IN_FLIGHT
from jserve.config import SchedConfig
from jserve.sched.sequence import Phase
from jserve.simulated import expected_tokens

PROMPT = prompt_of(0, 121)
BLOCKS = 30
"""Full blocks of the prompt, all of which may be found."""


def gap_at(start: int, end: int = BLOCKS, front: int | None = None) -> Strategy:
    """A strategy that leaves this gap in the prompt, if it can; what is before `front` is loaded from the host."""

    def choose(model: CostModel, reach: Reach) -> RestorePlan:
        first = max(reach.device_blocks, reach.device_blocks if front is None else front)
        if reach.disk_blocks < end or start <= first:
            return never_load(model, reach)
        plan = always_load(model, reach)
        return replace(
            plan,
            load_host_blocks=first - reach.device_blocks,
            stage_disk_blocks=0,
            deferred_disk_blocks=0,
            gap=(start, end),
        )

    return choose


def world_with(
    tier: str,
    strategy: Strategy,
    copy_s: Callable[[str, int], float] = lambda kind, blocks: 0.0,
    token_s: float = 1.0,
    **more: object,
) -> World:
    """One in which the prompt is on disk alone, or on the host as well. Computing a token is believed to take
    `token_s`: so long is a gap waited for."""
    before = World(device=64, host=64)
    before.ask("before", PROMPT)
    speed = {"copy_s": lambda kind, blocks: 0.0}
    said = {"device": 64, "host": 100, "staging": 64, "max_running": 4} | more
    world = World(
        disk=before.transfer.disk,
        strategy="always",
        copy_s=lambda kind, blocks: speed["copy_s"](kind, blocks),
        **said,  # type: ignore[arg-type]
    )
    if tier == "host":
        world.ask("to the host", PROMPT)
        blocks = world.cache.pool.allocate(world.cache.num_blocks)
        assert blocks is not None
        world.cache.pool.release(blocks)  # the device has forgotten it
        world.cache.disk = world.cache.tiers.disk = None
    speed["copy_s"] = copy_s
    world.cache.strategy = strategy
    world.cache.cost.prefill.per_token_s = token_s
    return world


def world_keys(world: World) -> list[bytes]:
    from jserve.cache.block_keys import extend_keys

    keys: list[bytes] = []
    extend_keys(keys, world.engine._root(""), PROMPT, BLOCK)
    return keys


def events_of(world: World, name: str) -> list[tuple[str, str]]:
    (timeline,) = world.engine.history(name).timelines
    return [(moment.kind, moment.detail) for moment in timeline.moments]


def first_token_s(world: World, name: str = "again") -> float:
    asked_s = world.clock.now()
    world.add(name, PROMPT)
    while not world.said[name]:
        world.step()
    return world.clock.now() - asked_s


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("orders_loads", [False, True])
def test_what_was_not_computed_was_brought_and_the_tokens_are_the_same(tier: str, orders_loads: bool) -> None:
    world = world_with(tier, gap_at(8), lambda kind, blocks: 0.004, orders_loads=orders_loads)
    world.ask("again", PROMPT)
    assert world.cached["again"] == (BLOCKS - 8) * BLOCK
    stats = world.cache.tier_stats
    assert (stats.gaps, stats.closed_gaps) == (1, 1)
    brought = stats.disk_hit_tokens if tier == "disk" else stats.host_hit_tokens
    assert brought == world.cached["again"]
    world.check_nothing_is_held()


def test_reading_beside_computing_takes_the_longer_of_the_two_and_not_their_sum() -> None:
    # A step of 10 ms computes 4 blocks: 16 blocks in 40 ms. The reads of the others take 40 ms together.
    def copy_s(kind: str, blocks: int) -> float:
        return 0.04 if kind == "read" else 0.0

    beside = first_token_s(world_with("disk", gap_at(16), copy_s))
    computed = first_token_s(world_with("disk", never_load, copy_s))
    loaded = first_token_s(world_with("disk", always_load, copy_s))
    assert computed == pytest.approx(0.08, abs=0.011)
    assert loaded == pytest.approx(0.08, abs=0.011)  # two rounds of reads
    assert beside == pytest.approx(0.05, abs=0.011)


def test_its_story_is_told() -> None:
    world = world_with("disk", gap_at(8), lambda kind, blocks: 0.2 if kind == "read" else 0.0)
    world.ask("again", PROMPT)
    told = events_of(world, "again")
    assert ("staging", "22 blocks from disk") in told
    assert ("admitted", "0 of 121 tokens are cached") in told
    assert ("loading", "after 32 tokens") in told
    assert ("loaded", "120 tokens have their KV") in told


def test_a_part_from_the_host_comes_first_where_it_is_said_so() -> None:
    world = world_with("host", gap_at(20, front=10), lambda kind, blocks: 0.004)
    world.ask("again", PROMPT)
    assert world.cached["again"] == 20 * BLOCK
    world.check_nothing_is_held()


def test_nobody_finds_a_block_of_the_gap_before_those_in_front_of_it() -> None:
    world = world_with("disk", gap_at(12), lambda kind, blocks: 0.03 if kind == "read" else 0.0)
    keys = world_keys(world)
    world.add("again", PROMPT)
    seen = set()
    while not world.said["again"]:
        world.step()
        for tier in (world.cache.index.block_of, lambda key: key if key in world.cache.host else None):
            held = [tier(key) is not None for key in keys]
            assert held == sorted(held, reverse=True)
        (sequence,) = [*world.engine._sequences.values()]
        gap = sequence.table.gap
        if gap is not None:
            assert sequence.num_computed <= gap.start * BLOCK
            seen.add((sequence.phase, gap.admitted))
    assert {(Phase.RUNNING, True), (Phase.LOADING, True)} <= seen
    world.run()
    world.check_nothing_is_held()


def test_decodes_go_on_while_a_gap_is_waited_for() -> None:
    world = world_with("disk", gap_at(4), lambda kind, blocks: 1.0 if kind == "read" else 0.0)
    world.add("decoding", prompt_of(1, 8), max_tokens=60)
    for _ in range(5):
        world.step()
    world.add("again", PROMPT)
    before = len(world.said["decoding"])
    while not world.said["again"]:
        world.step()
    assert len(world.said["decoding"]) - before > 40
    world.run()
    assert world.said["decoding"] == expected_tokens(prompt_of(1, 8), 60, VOCAB)
    assert world.cached["again"] == 26 * BLOCK


def test_waiting_for_a_gap_alone_takes_no_step() -> None:
    world = world_with("disk", gap_at(4), lambda kind, blocks: 1.0 if kind == "read" else 0.0)
    world.ask("again", PROMPT)
    assert sum(record.num_tokens == 0 for record in world.engine.step_records()) == 0
    assert len(world.engine.step_records()) < 8


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("lost", [12, 20, 29])
def test_a_block_that_is_lost_is_computed_with_those_before_it(tier: str, lost: int) -> None:
    world = world_with(tier, gap_at(8), lambda kind, blocks: 0.01)
    key = world_keys(world)[lost]
    world.add("again", PROMPT)
    if tier == "disk":
        del world.transfer.disk[key]
    else:
        for later in reversed(world_keys(world)[lost:]):
            world.cache.host.drop(later)
        next(iter(world.cache.gaps.open)).pin = None
    world.run()
    assert world.said["again"] == expected_tokens(PROMPT, 4, VOCAB)
    assert world.cached["again"] == ((29 - lost) * BLOCK if tier == "disk" else 0)
    world.check_nothing_is_held()


@pytest.mark.parametrize("kind", ["load", "read"])
def test_a_copy_that_fails_costs_computation_alone(kind: str) -> None:
    world = world_with("disk", gap_at(8), fails=lambda k: k == kind)
    world.ask("again", PROMPT)
    assert world.cached["again"] == 0
    world.check_nothing_is_held()


@pytest.mark.parametrize("kind", ["load", "read"])
def test_a_copy_that_never_ends_costs_its_deadline_and_no_more(kind: str) -> None:
    world = world_with("disk", gap_at(8), lambda k, blocks: 1e9 if k == kind else 0.0, wait_limit_s=2.0)
    assert 1.9 < first_token_s(world) < 2.3
    while world.engine.scheduler.has_work:
        world.step()
    assert world.said["again"] == expected_tokens(PROMPT, 4, VOCAB)
    assert world.cached["again"] == 0
    assert not world.cache.gaps.open


@pytest.mark.parametrize("kind", ["load", "read"])
def test_no_gap_is_waited_for_longer_than_computing_it_would_take(kind: str) -> None:
    never = lambda k, blocks: 1e9 if k == kind else 0.0  # noqa: E731
    world = world_with("disk", gap_at(8), never, token_s=1e-3, wait_limit_s=10.0)
    computed_s = first_token_s(world_with("disk", never_load))
    assert first_token_s(world) == pytest.approx(computed_s + (BLOCKS - 8) * BLOCK * 1e-3, abs=0.03)
    assert not world.cache.gaps.open
    world.clock.wait(10.0)
    world.run()
    assert world.said["again"] == expected_tokens(PROMPT, 4, VOCAB)
    world.check_nothing_is_held()


def test_reads_that_come_too_late_are_dropped_and_what_has_come_is_used() -> None:
    late = iter([0.0] * 10 + [1e9] * 100)
    world = world_with("disk", gap_at(8), lambda k, blocks: next(late) if k == "read" else 0.0, wait_limit_s=2.0)
    assert first_token_s(world) < 2.3
    world.run()
    assert world.said["again"] == expected_tokens(PROMPT, 4, VOCAB)
    assert world.cached["again"] == 10 * BLOCK  # the last of the prompt were read first
    world.check_nothing_is_held()


def test_a_host_without_a_slot_to_lend_makes_no_gap() -> None:
    world = world_with("disk", gap_at(8), lambda kind, blocks: 0.01, host=3)
    world.ask("again", PROMPT)
    assert world.cached["again"] <= 3 * BLOCK
    world.check_nothing_is_held()


@pytest.mark.parametrize("after_steps", range(0, 40, 3))
@pytest.mark.parametrize("what", ["abort", "recompute", "swap"])
def test_in_any_state_it_can_be_aborted_or_preempted_and_leaves_nothing(what: str, after_steps: int) -> None:
    preempt = "recompute" if what == "abort" else what
    sched = SchedConfig(max_running=2, token_budget=16, preempt=preempt)  # type: ignore[arg-type]
    world = world_with("disk", gap_at(16), lambda kind, blocks: 0.0305, sched=sched)
    world.add("again", PROMPT)
    for _ in range(after_steps):
        world.clock.wait(0.003)
        world.step()
    if what == "abort":
        world.engine.abort("again")
    else:
        state = world.engine.scheduler.state
        for victim in list(state.running.holders):
            from jserve.sched.yielding import preempt as give_way

            give_way(state, victim, victim)
    world.run()
    if what != "abort":
        assert world.said["again"] == expected_tokens(PROMPT, 4, VOCAB)
    world.check_nothing_is_held()


def test_a_part_that_is_given_back_closes_it() -> None:
    world = world_with("disk", gap_at(8), lambda kind, blocks: 0.01)
    world.add("again", PROMPT)
    for _ in range(2):
        world.step()
    (gap,) = world.cache.gaps.open
    world.cache.truncate(gap.table, 6)
    assert gap.table.gap is None
    assert world.cache.host.num_borrowed == 0


def test_random_gaps_never_say_a_wrong_token() -> None:
    closed = 0
    for seed in range(150):
        rng = random.Random(seed)
        slow = {kind: rng.choice([0.0, 0.003, 0.03]) for kind in ("store", "load", "read", "write")}
        bad = {kind: rng.choice([0.0, 0.0, 0.1]) for kind in slow}
        world = World(
            device=rng.randrange(24, 60),
            host=rng.randrange(8, 60),
            copy_s=lambda kind, blocks, slow=slow, rng=rng: slow[kind] * rng.random(),  # type: ignore[misc]
            fails=lambda kind, bad=bad, rng=rng: rng.random() < bad[kind],  # type: ignore[misc]
            strategy=with_gaps(rng),
            staging=rng.choice([8, 40]),
            wait_limit_s=rng.choice([0.1, 5.0]),
            orders_loads=rng.choice([False, True]),
            max_running=rng.randrange(1, 4),
        )
        chats = [prompt_of(i, rng.randrange(20, 60)) for i in range(4)]
        for turn in range(3):
            for i, chat in enumerate(chats):
                world.add(f"{turn}.{i}", list(chat), 3)
                for _ in range(rng.randrange(4)):
                    world.step()
                    world.check_books()
            if rng.random() < 0.3:
                world.engine.abort(f"{turn}.{rng.randrange(4)}")
            world.run()
            for i, chat in enumerate(chats):
                said = world.said[f"{turn}.{i}"]
                assert said == expected_tokens(chat, len(said), VOCAB), seed
                chat += [*said, rng.randrange(VOCAB)]
            world.check_nothing_is_held()
        closed += world.cache.tier_stats.closed_gaps
    assert closed > 100


def test_a_copy_for_a_gap_that_is_gone_lands_in_nobodys_block() -> None:
    world = world_with("disk", gap_at(4), lambda kind, blocks: 0.05 if kind == "load" else 0.0, device=32)
    world.add("again", PROMPT)
    while not (world.cache.gaps.open and next(iter(world.cache.gaps.open)).load_ticket):
        world.step()
    world.engine.abort("again")
    world.ask("next", prompt_of(5, 110), 14)  # in the blocks that were copied into, while the copy would have ended


def test_the_sources_of_a_copy_in_turn_are_kept_when_the_gap_is_closed() -> None:
    slow = {"load": 0.5}
    world = world_with("host", gap_at(8), lambda kind, blocks: slow.get(kind, 0.0), orders_loads=True)
    world.add("again", PROMPT)
    while not world.said["again"]:
        world.step()
    assert not world.cache.gaps.open
    assert all(world.cache.host.is_pinned(key) for key in world_keys(world)[8:BLOCKS])
    world.run()
    world.check_nothing_is_held()


def test_a_part_that_is_computed_after_all_is_not_counted_as_brought() -> None:
    # Blocks 8 to 14 are on the host, and their copy is slow; of those on disk, the 20th is missing.
    def copy_s(kind: str, blocks: int) -> float:
        return {"load": 0.02 * blocks, "read": 0.004 * world.random.random()}.get(kind, 0.0)

    for seed in range(20):
        world = world_with("disk", never_load)
        keys = world_keys(world)
        world.cache.strategy = gap_at(8, front=0)
        world.random = random.Random(seed)  # type: ignore[attr-defined]
        for i, key in enumerate(keys[:15]):
            slot = world.cache.host.reserve(key, keys[i - 1] if i else None)
            assert slot is not None
            world.transfer.host[slot] = list(world.transfer.disk[key])
            world.cache.host.fill(key, write_back=False)
        world.transfer._copy_s = copy_s
        del world.transfer.disk[keys[20]]
        world.ask("again", PROMPT)
        assert world.cached["again"] == 9 * BLOCK
        world.check_nothing_is_held()


def test_reads_that_never_have_their_turn_are_not_waited_for_either() -> None:
    # Each read has time, but there are more of them than may be under way at once.
    world = world_with("disk", gap_at(4), lambda kind, blocks: 1.5 if kind == "read" else 0.0, wait_limit_s=2.0)
    assert first_token_s(world) < 2.3
    world.run()
    assert world.cached["again"] == READS_IN_FLIGHT * BLOCK
    assert world.cache.tier_stats.failed_reads == 0
    world.check_nothing_is_held()


def test_a_block_that_is_on_its_way_to_the_host_is_waited_for() -> None:
    world = world_with("disk", never_load)
    keys, host = world_keys(world), world.cache.host
    world.cache.strategy = gap_at(8, front=0)
    slots = [host.reserve(key, keys[i - 1] if i else None) for i, key in enumerate(keys[:15])]
    world.add("again", PROMPT)
    for _ in range(8):
        world.step()
    assert not world.said["again"]
    for key, slot in zip(keys, slots, strict=False):
        assert slot is not None
        world.transfer.host[slot] = list(world.transfer.disk[key])
        host.fill(key, write_back=False)
    world.run()
    assert world.said["again"] == expected_tokens(PROMPT, 4, VOCAB)
    assert world.cached["again"] == (BLOCKS - 8) * BLOCK
    world.check_nothing_is_held()
