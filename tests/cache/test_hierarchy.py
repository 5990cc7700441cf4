"""The hierarchy under the production scheduler, in a simulated world where copies are slow, fail or never end."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers_world import BLOCK, VOCAB, World, prompt_of, with_gaps

from jserve.cache.cost import restore_strategy
from jserve.cache.disk_tier import DiskTier
from jserve.cache.host_tier import HostTier
from jserve.cache.kv_cache import BlockTable, KVCache
from jserve.cache.pause import Pause
from jserve.cache.restore import Read
from jserve.cache.staging import READS_IN_FLIGHT
from jserve.cache.write_back import WRITES_IN_FLIGHT
from jserve.cache.write_through import SLACK
from jserve.simulated import expected_tokens


def test_a_history_that_left_the_device_comes_back_from_the_host() -> None:
    world = World(disk_blocks=None)
    first = world.ask("first", prompt_of(0, 30))
    world.ask("other", prompt_of(1, 40))  # takes all the device's blocks
    world.ask("again", first)
    assert world.cached["again"] == 32
    assert world.cache.tier_stats.host_hit_tokens + world.cache.tier_stats.device_hit_tokens == 32
    assert world.cache.tier_stats.host_hit_tokens > 0
    world.check_nothing_is_held()


def test_a_device_that_keeps_nothing_gets_every_history_from_the_host() -> None:
    world = World(disk_blocks=None, device_reuse=False, store_budget=1)
    first = world.ask("first", prompt_of(0, 30))
    assert world.cache.pool.num_reclaimable == 0
    world.ask("again", first)
    assert world.cached["again"] == 32
    assert world.cache.tier_stats.host_hit_tokens == 32
    world.check_nothing_is_held()


def test_what_left_the_host_as_well_is_staged_from_disk() -> None:
    world = World(host=14)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    world.ask("again", first)
    assert world.cached["again"] == 32
    assert world.cache.tier_stats.disk_hit_tokens == 32
    world.check_nothing_is_held()


def test_a_restart_finds_on_disk_what_the_process_before_it_wrote() -> None:
    before = World()
    conversation = before.ask("before", prompt_of(0, 30))
    before.engine.close()
    after = World(disk=before.transfer.disk)
    after.ask("after", conversation)
    assert after.cached["after"] == 32


def test_a_request_after_a_long_sleep_has_all_its_time() -> None:
    world = World(host=14, copy_s=lambda kind, blocks: 0.1)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    world.clock.wait(3600.0)
    world.ask("again", first)
    assert world.cached["again"] == 32
    assert world.cache.tier_stats.expired_waits == 0


def test_the_disk_keeps_to_its_capacity() -> None:
    world = World(disk_blocks=9, copy_s=lambda kind, blocks: 0.07)
    for i in range(6):
        world.add(str(i), prompt_of(i, 30))
    while world.engine.has_work:
        world.step()
        assert len(world.transfer.disk) <= 9
    assert world.cache.disk is not None
    assert set(world.transfer.disk) == set(world.cache.disk._order._entries)


@pytest.mark.parametrize("strategy", ["flashgen", "never", "cost", "threshold:8", "always"])
def test_every_restore_strategy_gives_the_same_tokens(strategy: str) -> None:
    world = World(host=14, strategy=strategy, copy_s=lambda kind, blocks: 0.02 * blocks)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    world.ask("again", first)
    assert world.cached["again"] == (0 if strategy in ("never", "flashgen", "threshold:8") else 32)


def test_flashgen_stages_only_behind_another_request() -> None:
    world = World(host=14, strategy="flashgen", max_running=1)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    world.add("ahead", prompt_of(9, 20))
    world.add("ahead too", prompt_of(10, 20))
    world.add("again", first)
    world.run()
    assert world.cached["again"] == 32


def test_eviction_by_look_ahead_keeps_on_disk_what_the_queue_needs() -> None:
    def left(eviction: str) -> int:
        world = World(host=10, disk_blocks=16, eviction=eviction, max_running=1, staging=0)
        first = world.ask("first", prompt_of(0, 30))
        world.ask("flood", prompt_of(4, 40))  # host and device forget the first
        for i in range(1, 4):
            world.add(f"other {i}", prompt_of(i, 30))
        world.add("again", first)
        while not world.said["other 3"]:
            world.step()
        restore = next(reversed(world.cache.tiers.restores))
        assert world.cache.disk is not None
        return sum(key in world.cache.disk for key in restore.table.keys)

    assert left("lookahead") > left("fifo")


def test_prefill_times_are_observed() -> None:
    world = World(disk_blocks=None)
    predicted = world.cache.cost.prefill.seconds(16)
    world.ask("first", prompt_of(0, 40))
    assert world.cache.cost.prefill.seconds(16) != predicted


def test_decodes_go_on_while_another_request_loads() -> None:
    world = World(disk_blocks=None, device=40, copy_s=lambda kind, blocks: 1.0 if kind == "load" else 0.0)
    first = world.ask("first", prompt_of(0, 30))
    world.ask("flood", prompt_of(5, 140))
    world.add("decoding", prompt_of(1, 8), max_tokens=60)
    for _ in range(5):
        world.step()
    world.add("again", first)
    world.step()
    before = len(world.said["decoding"])
    while not world.said["again"]:
        world.step()
    assert len(world.said["decoding"]) - before > 20  # steps of 10 ms, during a load of 1 s
    world.run()
    assert world.said["decoding"] == expected_tokens(prompt_of(1, 8), 60, VOCAB)
    assert world.cached["again"] > 0


def test_a_load_that_has_its_turn_before_the_next_step_costs_no_step() -> None:
    def steps(orders_loads: bool) -> tuple[int, World]:
        world = World(disk_blocks=None, device=40, orders_loads=orders_loads, copy_s=lambda kind, blocks: 0.004)
        first = world.ask("first", prompt_of(0, 30))
        world.ask("flood", prompt_of(5, 140))
        world.add("decoding", prompt_of(1, 8), max_tokens=60)
        for _ in range(5):
            world.step()
        before = len(world.said["decoding"])
        world.add("again", first)
        while not world.said["again"]:
            world.step()
        taken = len(world.said["decoding"]) - before
        world.run()
        assert world.said["again"] == expected_tokens(first, 4, VOCAB)
        world.check_nothing_is_held()
        return taken, world

    (ordered, world), (unordered, _) = steps(True), steps(False)
    assert ordered < unordered
    assert world.cache.tier_stats.host_hit_tokens > 0


def test_the_source_of_a_load_is_kept_until_it_has_been_read() -> None:
    world = World(disk_blocks=None, orders_loads=True, copy_s=lambda kind, blocks: 0.5 if kind == "load" else 0.0)
    first = world.ask("first", prompt_of(0, 30))
    world.ask("flood", prompt_of(1, 40))
    world.add("again", first)
    while not world.said["again"]:
        world.step()
    assert any(world.cache.host.is_pinned(key) for key in world.cache.host._slot_of)
    world.run()
    world.check_nothing_is_held()


def test_two_requests_that_together_fill_the_pool_both_end() -> None:
    world = World(device=16, copy_s=lambda kind, blocks: 0.3)
    histories = [world.ask(str(i), prompt_of(i, 27), 4) for i in range(2)]
    world.ask("flood", prompt_of(7, 60))
    for i, history in enumerate(histories):
        world.add(f"again {i}", history)
    world.run()
    for i, history in enumerate(histories):
        assert world.said[f"again {i}"] == expected_tokens(history, 4, VOCAB)
    world.check_nothing_is_held()


@pytest.mark.parametrize("kind", ["load", "read"])
def test_a_copy_that_never_ends_costs_its_deadline_and_no_more(kind: str) -> None:
    world = World(host=14, copy_s=lambda k, blocks: 1e9 if k == kind else 0.0, wait_limit_s=2.0)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    asked_s = world.clock.now()
    world.add("again", first)
    while not world.said["again"]:
        world.step()
    assert 2.0 <= world.clock.now() - asked_s < 4.5
    while world.engine.scheduler.has_work:
        world.step()
    assert world.said["again"] == expected_tokens(first, 4, VOCAB)
    assert world.cache.tier_stats.expired_waits >= 1
    assert world.cache.pool.num_free == world.cache.num_blocks


def test_a_disk_that_hangs_costs_one_request_its_time_and_no_slot() -> None:
    world = World(host=14, copy_s=lambda kind, blocks: 1e9 if kind == "read" else 0.0, wait_limit_s=2.0)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    world.ask("again", first)
    for i in range(1, 4):
        asked_s = world.clock.now()
        world.ask(f"other {i} again", prompt_of(i, 40))
        assert world.clock.now() - asked_s < 0.5
    assert not world.cache.host._filling
    assert len(world.notes) == 1
    assert not world.engine.has_work
    world.check_nothing_is_held()


def test_a_block_that_someone_else_has_computed_meanwhile_is_not_waited_for() -> None:
    world = World(host=14, strategy="always", copy_s=lambda kind, blocks: 3.0 if kind == "read" else 0.0)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    world.add("waits", first)
    world.cache.strategy = restore_strategy("never")
    world.add("computes", first)
    while not world.said["waits"]:
        world.step()
    assert not world.said["computes"] or world.cache.tier_stats.read_blocks == 0
    world.run()
    assert world.said["waits"] == world.said["computes"] == expected_tokens(first, 4, VOCAB)


@pytest.mark.parametrize("device", range(12, 20))
def test_a_request_that_gives_way_with_a_token_in_flight_says_it_once(device: int) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        read_s = rng.choice([0.01, 0.03, 0.1])
        world = World(
            host=14,
            device=device,
            max_running=rng.randrange(2, 5),
            copy_s=lambda kind, blocks, read_s=read_s: read_s if kind == "read" else 0.0,  # type: ignore[misc]
        )
        first = world.ask("first", prompt_of(0, 30))
        for i in range(1, 4):
            world.ask(f"other {i}", prompt_of(i, 40))
        prompts = {"again": first, **{str(i): prompt_of(20 + i, rng.randrange(3, 20)) for i in range(3)}}
        for name, prompt in prompts.items():
            world.add(name, prompt, rng.randrange(2, 13))
            for _ in range(rng.randrange(3)):
                world.step()
        world.run()
        for name, prompt in prompts.items():
            assert world.said[name] == expected_tokens(prompt, len(world.said[name]), VOCAB), (device, seed, name)


def test_a_deferred_request_does_not_wait_again_for_a_disk_that_is_stuck() -> None:
    world = World(host=14, staging=3, copy_s=lambda kind, blocks: 1e9 if kind == "read" else 0.0, wait_limit_s=2.0)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    asked_s = world.clock.now()
    world.add("again", first)
    while not world.said["again"]:
        world.step()
    assert world.clock.now() - asked_s < 2.5


@pytest.mark.parametrize("kind", ["store", "load", "read", "write"])
def test_a_tier_that_always_fails_costs_only_its_benefit(kind: str) -> None:
    world = World(host=14, fails=lambda k: k == kind)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    world.ask("again", first)
    assert len(world.notes) == 1
    world.check_nothing_is_held()


@pytest.mark.parametrize("kind", ["store", "load"])
def test_a_link_that_hangs_costs_one_request_its_time_and_recovers(kind: str) -> None:
    hangs = True
    world = World(
        host=40, disk_blocks=None, copy_s=lambda k, blocks: 1e9 if k == kind and hangs else 0.0, wait_limit_s=2.0
    )
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    world.ask("again", first)
    pause = world.cache.host.writing if kind == "store" else world.cache.host.reading
    assert not pause.is_over(world.clock.now())
    for i in range(1, 4):
        asked_s = world.clock.now()
        world.ask(f"other {i} again", prompt_of(i, 40))
        assert world.clock.now() - asked_s < 0.5
    stats = world.cache.stats()
    assert len(world.notes) == stats["host_faults"] == 1
    assert not world.cache.host._filling
    assert not world.engine.has_work
    world.check_nothing_is_held()
    hangs = False
    world.clock.wait(2.0)
    first = world.ask("first, later", first)
    world.ask("flood", prompt_of(9, 40))
    before = world.cache.tier_stats.loaded_blocks
    world.ask("from the host", first)
    assert world.cache.tier_stats.loaded_blocks > before
    assert pause == Pause(until_s=pause.until_s)  # the next fault is a first one
    world.check_nothing_is_held()


@pytest.mark.parametrize("orders_loads", [False, True])
def test_copies_that_have_their_turn_among_slow_steps_are_no_fault_of_the_link(orders_loads: bool) -> None:
    world = World(
        disk_blocks=None,
        in_turn=True,
        orders_loads=orders_loads,
        copy_s=lambda kind, blocks: 3.0 if kind == "store" or orders_loads else 0.0,
        wait_limit_s=2.0,
    )
    first = world.ask("first", prompt_of(0, 30))
    world.ask("flood", prompt_of(1, 40))
    world.ask("again", first)
    assert world.cached["again"] == 32
    stats = world.cache.stats()
    assert stats["failed_stores"] == stats["failed_loads"] == stats["host_faults"] == 0
    world.check_nothing_is_held()


def test_a_load_that_nobody_waits_for_and_that_hangs_keeps_no_source() -> None:
    slow = {"load": 1e9}
    world = World(
        disk_blocks=None, orders_loads=True, copy_s=lambda kind, blocks: slow.get(kind, 0.0), wait_limit_s=2.0
    )
    first = world.ask("first", prompt_of(0, 30))
    world.ask("flood", prompt_of(1, 40))
    world.add("again", first)
    while not world.said["again"]:
        world.step()
    world.clock.wait(2.0)
    world.run()
    assert world.said["again"] == expected_tokens(first, 4, VOCAB)
    world.check_nothing_is_held()


def test_a_link_that_fails_while_a_request_waits_is_not_used_for_it() -> None:
    swapped = Swapped()
    swapped.cache.swap_out(swapped.table)
    swapped.overwrite_the_device()
    swapped.poll()
    swapped.cache.tiers.fault(swapped.cache.host, swapped.cache.host.reading, "read", "it failed")
    assert swapped.cache.is_ready(swapped.table)
    assert swapped.admit() == []
    swapped.cache.release(swapped.table)
    swapped.world.check_nothing_is_held()


def test_while_the_link_has_failed_nothing_is_decided_to_come_over_it_nor_read_from_disk() -> None:
    world = World(host=14)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    before = world.cache.tier_stats.stage_decisions, world.cache.tier_stats.read_blocks
    world.cache.tiers.fault(world.cache.host, world.cache.host.reading, "read", "it failed")
    world.ask("again", first)
    assert world.cached["again"] == 0
    assert (world.cache.tier_stats.stage_decisions, world.cache.tier_stats.read_blocks) == before


def test_while_the_host_link_is_left_alone_no_more_waits_to_be_copied_than_the_device_can_hold() -> None:
    world = World(disk_blocks=None, device=40, host=400)
    world.cache.host.writing.until_s = float("inf")
    for i in range(60):
        world.ask(f"r{i}", prompt_of(i, 40))
    assert 0 < len(world.cache.stores) <= 2 * 40 + SLACK


def test_a_link_that_fails_again_and_again_is_told_of_once_and_tried_less_and_less() -> None:
    world = World(disk_blocks=None, fails=lambda kind: kind == "store")
    for i in range(40):
        world.ask(str(i), prompt_of(i, 20))
        world.clock.wait(1.0)
    stats = world.cache.stats()
    assert len(world.notes) == 1
    assert 3 <= stats["host_faults"] == stats["failed_stores"] <= 7
    assert not stats["host_is_written"]


def test_what_is_due_while_the_link_has_failed_is_stored_after_the_pause() -> None:
    world = World(disk_blocks=None)
    world.cache.tiers.fault(world.cache.host, world.cache.host.writing, "written", "it failed")
    world.ask("first", prompt_of(0, 30))
    assert not world.engine.has_work  # nothing to do before the pause is over
    assert len(world.cache.host) == 0
    world.clock.wait(2.0)
    world.ask("other", [1], 1)
    assert len(world.cache.host) == 8


def test_what_waits_keeps_the_blocks_before_one_that_was_lost() -> None:
    world = World(host=14, max_running=1, copy_s=lambda kind, blocks: 0.03 if kind == "read" else 0.0)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    world.add("ahead", prompt_of(9, 4), 20)
    world.add("again", first)
    world.step()
    restore = next(reversed(world.cache.tiers.restores))
    keys = restore.table.keys
    del world.transfer.disk[keys[5]]
    while world.cache.tier_stats.read_blocks < 5:
        world.step()
    assert restore.pin == keys[4]
    assert world.cache.host.is_pinned(keys[4])
    world.run()
    assert world.cached["again"] == 5 * BLOCK
    world.check_nothing_is_held()


def test_nothing_is_swapped_over_a_link_that_has_just_failed() -> None:
    swapped = Swapped()
    swapped.cache.tiers.fault(swapped.cache.host, swapped.cache.host.writing, "written", "it failed")
    assert not swapped.cache.swap_or_recompute(swapped.table, 21).swap
    assert swapped.cache.swap_out(swapped.table) == 0
    swapped.cache.release(swapped.table)
    swapped.world.check_nothing_is_held()


def test_a_full_disk_is_still_read_and_complained_of_once() -> None:
    full = False
    world = World(host=14, fails=lambda kind: kind == "write" and full)
    first = world.ask("first", prompt_of(0, 30))
    full = True
    for i in range(1, 8):
        world.ask(f"other {i}", prompt_of(i, 40))
        world.clock.wait(1.5)
    world.ask("again", first)
    assert world.cached["again"] == 32
    assert len(world.notes) == 1


def test_a_disk_that_recovers_is_used_again() -> None:
    broken = True
    world = World(host=14, fails=lambda kind: kind == "write" and broken)
    first = world.ask("first", prompt_of(0, 30))
    assert not world.transfer.disk
    broken = False
    world.clock.wait(2.0)
    first = world.ask("again", first)
    assert world.transfer.disk


@pytest.mark.parametrize("after_steps", range(8))
def test_a_request_that_is_aborted_in_any_state_leaves_nothing(after_steps: int) -> None:
    world = World(host=14, copy_s=lambda kind, blocks: 0.02)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    world.add("again", first)
    for _ in range(after_steps * 4):
        world.step()
    world.engine.abort("again")
    world.run()
    world.check_nothing_is_held()


def test_a_load_that_nobody_waits_for_any_more_lands_in_nobodys_block() -> None:
    world = World(disk_blocks=None, copy_s=lambda kind, blocks: 0.1 if kind == "load" else 0.0)
    first = world.ask("first", prompt_of(0, 30))
    world.ask("flood", prompt_of(1, 40))
    world.add("again", first)
    world.step()
    assert world.engine.scheduler.loading
    world.engine.abort("again")
    world.ask("next", prompt_of(2, 30), 14)  # in the blocks that were being loaded, while the copy would have ended


def test_what_was_written_over_before_its_turn_is_not_stored() -> None:
    world = World(disk_blocks=None, store_budget=1, max_running=1, copy_s=lambda kind, blocks: 0.05)
    for i in range(3):
        world.add(str(i), prompt_of(i, 40), 1)
    world.run()
    assert world.cache.tier_stats.skipped_stores > 0
    for i in range(3):
        world.ask(f"again {i}", prompt_of(i, 40), 1)


def test_statistics_tell_blocks_and_bytes_of_each_tier() -> None:
    world = World()
    world.ask("first", prompt_of(0, 30))
    stats, size = world.cache.stats(), world.cache.cost.block_bytes
    assert stats["device_bytes"] == 12 * size
    assert stats["device_used_bytes"] == stats["host_used_bytes"] == stats["disk_used_bytes"] == 8 * size
    assert stats["stored_blocks"] == stats["written_blocks"] == stats["disk_used_blocks"] == 8
    assert stats["host_write_back_backlog"] == stats["corrupt_blocks"] == stats["load_decisions"] == 0
    assert stats["decisions"] == 1


def test_a_decision_starts_no_copy_and_the_reads_come_a_few_at_a_time() -> None:
    world = World(device=80, host=80, disk_blocks=400, staging=70, copy_s=lambda kind, blocks: 0.01)
    first = world.ask("first", prompt_of(0, 240))
    world.ask("other", prompt_of(1, 300))
    world.ask("other too", prompt_of(2, 300))
    world.add("again", first)
    assert reads_under_way(world) == 0
    world.step()
    assert reads_under_way(world) == READS_IN_FLIGHT
    world.run()
    assert world.cached["again"] == 240
    stats = world.cache.tier_stats
    assert (stats.decisions, stats.stage_decisions) == (4, 1)


def reads_under_way(world: World) -> int:
    return sum(isinstance(operation, Read) for operation in world.cache.tiers.under_way.values())


def test_a_disk_that_hangs_at_writing_is_given_up_and_told_of_once() -> None:
    world = World(host=40, copy_s=lambda kind, blocks: 1e9 if kind == "write" else 0.0, wait_limit_s=2.0)
    world.add("first", prompt_of(0, 30))
    for _ in range(40):
        world.step()
    held = [key for key in world.cache.host._slot_of if world.cache.host.is_pinned(key)]
    assert len(held) == WRITES_IN_FLIGHT
    world.clock.wait(2.0)
    world.run()
    assert len(world.notes) == 1
    assert world.cache.tier_stats.failed_writes == WRITES_IN_FLIGHT
    assert world.cache.host.write_back_backlog == 8
    world.check_nothing_is_held()


def test_an_aborted_request_keeps_its_share_of_the_staging_region_until_its_reads_have_ended() -> None:
    world = World(host=14, copy_s=lambda kind, blocks: 0.5 if kind == "read" else 0.0)
    first = world.ask("first", prompt_of(0, 30))
    for i in range(1, 4):
        world.ask(f"other {i}", prompt_of(i, 40))
    world.add("again", first)
    world.step()
    assert world.cache.staging.taken == reads_under_way(world) == 8
    world.engine.abort("again")
    assert world.cache.staging.taken == 8
    world.run()
    world.check_nothing_is_held()


def test_what_the_host_had_no_slot_for_is_stored_when_it_is_used_again() -> None:
    fails = True
    world = World(disk_blocks=None, device=40, host=100, fails=lambda kind: kind == "store" and fails)
    first = world.ask("first", prompt_of(0, 30))
    assert world.cache.tier_stats.stored_blocks == 0
    fails = False
    world.clock.wait(2.0)  # it is tried again after a pause
    again = world.ask("again", first)
    assert world.cached["again"] == 32
    world.ask("flood", prompt_of(1, 155))  # takes all of the device
    world.ask("from the host", again)
    assert world.cache.tier_stats.host_hit_tokens >= 32


def test_a_block_whose_parent_is_not_on_the_host_is_not_stored_there() -> None:
    fails = True
    world = World(disk_blocks=None, device=40, host=100, store_budget=3, fails=lambda kind: kind == "store" and fails)
    world.add("first", prompt_of(0, 40), 1)
    while not world.cache.tier_stats.failed_stores:
        world.step()
    fails = False
    world.clock.wait(2.0)
    world.run()
    host = world.cache.host
    assert world.cache.tier_stats.skipped_stores > 0
    assert all(host.parent(key) is None or host.parent(key) in host for key in host._slot_of)


def test_every_run_of_blocks_that_are_loaded_is_kept_until_then() -> None:
    slow = {"load": 0.5}
    world = World(disk_blocks=None, device=40, host=100, copy_s=lambda kind, blocks: slow.get(kind, 0.0))
    first = world.ask("first", prompt_of(0, 40))
    table = BlockTable(world.engine._root(""))
    keys = world.cache.kept(table, first) and table.keys
    device = world.cache.index
    for i in (1, 2, 5, 6):  # the device forgets these, and has the others
        block = device.block_of(keys[i])
        assert block is not None
        world.cache.pool.blank([block])
    world.add("again", first)
    world.step()
    assert world.cache.host.is_pinned(keys[2])
    assert world.cache.host.is_pinned(keys[6])
    world.run()
    assert world.said["again"] == expected_tokens(first, 4, VOCAB)
    world.check_nothing_is_held()


def test_what_waits_to_be_stored_is_never_more_than_the_device_holds() -> None:
    world = World(disk_blocks=None, device=20, host=2, store_budget=1, max_running=2)
    first = world.ask("first", prompt_of(0, 40))
    most = 0
    for i in range(60):
        world.add(f"same {i}", first, 1)
        world.add(f"other {i}", prompt_of(i + 1, 8), 1)
        for _ in range(3):
            world.step()
            most = max(most, len(world.cache.stores))
    assert most <= 2 * world.cache.num_blocks
    world.run()


def test_what_waits_for_a_broken_disk_is_tried_once_more_before_the_end() -> None:
    broken = True
    world = World(fails=lambda kind: kind == "write" and broken)
    conversation = world.ask("first", prompt_of(0, 30))
    assert not world.engine.has_work
    assert world.cache.host.write_back_backlog == 8
    broken = False
    world.engine.close()
    assert len(world.transfer.disk) == 8
    after = World(disk=world.transfer.disk)
    after.ask("after", conversation)
    assert after.cached["after"] == 32


def test_a_disk_that_stays_broken_does_not_keep_the_engine_from_closing() -> None:
    world = World(fails=lambda kind: kind == "write")
    world.ask("first", prompt_of(0, 30))
    closed_s = world.clock.now()
    world.engine.close()
    assert world.clock.now() - closed_s < 1.0


def test_a_late_miss_takes_nothing_from_a_block_that_was_written_since() -> None:
    disk = DiskTier(4)
    disk.reserve()
    disk.add(b"key", None)
    read = disk.version(b"key")
    disk.drop(b"key", read)
    disk.reserve()
    disk.add(b"key", None)
    disk.drop(b"key", read)
    assert b"key" in disk
    disk.drop(b"key", disk.version(b"key"))
    assert b"key" not in disk


@pytest.mark.parametrize("eviction", ["lru", "fifo", "lookahead"])
def test_a_full_host_never_gives_up_a_block_for_its_own_child(eviction: str) -> None:
    host = HostTier(2, eviction)
    for key, parent in ((b"a", None), (b"b", None)):
        assert host.reserve(key, parent) is not None
        host.fill(key, write_back=False)
    assert host.reserve(b"aa", b"a") is not None
    assert b"a" in host
    host.fill(b"aa", write_back=False)
    host.pin(b"a")
    assert host.reserve(b"aaa", b"aa") is None  # the one block that could go is its parent
    assert not host.is_pinned(b"aa")


class Swapped:
    """One sequence of `blocks` full blocks with known KV in a cache of its own."""

    def __init__(
        self, *, host: int = 40, copy_s: float = 0.0, fails: Callable[[str], bool] = lambda kind: False
    ) -> None:
        self.world = World(disk_blocks=None, host=host, copy_s=lambda kind, blocks: copy_s, fails=fails)
        self.cache, self.kv = self.world.cache, self.world.transfer._executor.kv
        self.tokens, self.table = prompt_of(0, 5 * BLOCK + 1), BlockTable(b"root")
        assert self.cache.admit(self.table, self.tokens) is not None
        for i, block in enumerate(self.table.blocks):
            self.kv[block] = [i] * BLOCK
        self.cache.publish(self.table, self.tokens, len(self.tokens))

    def overwrite_the_device(self) -> None:
        blocks = self.cache.pool.allocate(self.cache.pool.num_free)
        assert blocks is not None
        for block in blocks:
            self.kv[block] = [-1] * BLOCK
        self.cache.pool.release(blocks)

    def poll(self, seconds: float = 0.0) -> None:
        self.world.clock.wait(seconds)
        self.cache.poll(self.world.clock.now())

    def admit(self) -> list[list[int]]:
        """What its leading blocks hold when it is back."""
        admission = self.cache.admit(self.table, self.tokens)
        assert admission is not None
        cached: int | None = admission.num_cached
        if admission.loading:
            self.poll(1.0)
            cached = self.cache.restored(self.table)
        assert cached is not None
        return [self.kv[block] for block in self.table.blocks[: cached // BLOCK]]


def test_a_sequence_that_is_swapped_out_comes_back_as_it_was() -> None:
    swapped = Swapped(copy_s=0.1)
    assert swapped.cache.swap_out(swapped.table) == 5
    assert swapped.table.blocks == []
    assert swapped.cache.pool.num_free == 12
    swapped.overwrite_the_device()
    assert not swapped.cache.is_ready(swapped.table)  # the copies are under way
    swapped.poll(0.2)
    assert swapped.cache.is_ready(swapped.table)
    assert swapped.admit() == [[i] * BLOCK for i in range(5)]
    swapped.cache.release(swapped.table)
    swapped.world.check_nothing_is_held()


def test_a_block_that_is_still_on_its_way_to_the_host_is_not_loaded_from_there() -> None:
    swapped = Swapped(copy_s=0.1)
    swapped.cache.swap_out(swapped.table)
    swapped.overwrite_the_device()
    assert swapped.admit() == []


def test_what_is_swapped_out_stays_on_the_host_until_its_sequence_is_back() -> None:
    swapped = Swapped(host=8)
    swapped.cache.swap_out(swapped.table)
    swapped.poll()
    for i in range(1, 4):
        swapped.world.ask(str(i), prompt_of(i, 40))  # more than the host holds
    assert len(swapped.admit()) == 5
    swapped.cache.release(swapped.table)
    swapped.world.check_nothing_is_held()


def test_a_part_can_be_swapped_out_alone() -> None:
    swapped = Swapped()
    kept = list(swapped.table.blocks[:3])
    assert swapped.cache.swap_out(swapped.table, 3) == 5
    assert swapped.table.blocks == kept
    swapped.cache.release(swapped.table)
    swapped.poll()
    swapped.world.check_nothing_is_held()


def test_a_swap_for_which_the_host_has_too_little_room_keeps_the_head() -> None:
    swapped = Swapped(host=3)
    assert swapped.cache.swap_out(swapped.table) == 3
    swapped.poll()
    swapped.overwrite_the_device()
    assert swapped.admit() == [[i] * BLOCK for i in range(3)]


def test_a_swap_that_fails_costs_computation_alone() -> None:
    swapped = Swapped(fails=lambda kind: kind == "store")
    swapped.cache.swap_out(swapped.table)
    swapped.overwrite_the_device()
    swapped.poll()
    assert swapped.cache.is_ready(swapped.table)
    assert swapped.admit() == []
    swapped.cache.release(swapped.table)
    swapped.world.check_nothing_is_held()


def test_swap_is_chosen_where_copying_is_cheaper_than_computing() -> None:
    swapped = Swapped()
    assert swapped.cache.swap_or_recompute(swapped.table, 21).swap
    swapped.cache.cost.host_to_device.bytes_per_s = 1.0
    assert not swapped.cache.swap_or_recompute(swapped.table, 21).swap
    assert not KVCache(4, BLOCK).swap_or_recompute(BlockTable(b"root"), 21).swap


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_conversations_over_random_tiers_say_what_one_endless_device_says(seed: int) -> None:
    rng = random.Random(seed)
    slow = {kind: rng.choice([0.0, 0.003, 0.05, 0.5]) for kind in ("store", "load", "read", "write")}
    bad = {kind: rng.choice([0.0, 0.0, 0.2]) for kind in slow}
    world = World(
        device=rng.randrange(12, 30),
        host=rng.randrange(1, 40),
        disk_blocks=rng.choice([None, 1, 10, 100]),
        copy_s=lambda kind, blocks: slow[kind] * rng.random(),
        fails=lambda kind: rng.random() < bad[kind],
        strategy=rng.choice(
            ["always", "never", "cost", "flashgen", "threshold:8", with_gaps(rng), with_gaps(rng, 0.5)]
        ),
        eviction=rng.choice(["lru", "fifo", "lookahead"]),
        staging=rng.choice([0, 2, 8, 100]),
        wait_limit_s=rng.choice([0.1, 5.0]),
        store_budget=rng.choice([1, 16]),
        orders_loads=rng.choice([False, True]),
        max_running=rng.randrange(1, 5),
    )
    once = world.transfer.poll
    world.transfer.poll = lambda: [end for end in once() for _ in range(rng.choice([1, 1, 2]))]  # type: ignore[method-assign]
    chats = [prompt_of(rng.randrange(3), rng.randrange(1, 12)) for _ in range(4)]
    for turn in range(4):
        prompts = {}
        for i, chat in enumerate(chats):
            if len(chat) > 36:
                continue
            prompts[f"{turn}.{i}"] = list(chat)
            world.add(f"{turn}.{i}", list(chat), rng.randrange(1, 9))
            for _ in range(rng.randrange(4)):
                world.step()
        aborted = rng.choice([None, *prompts])
        if aborted is not None and rng.random() < 0.3:
            world.engine.abort(aborted)
        else:
            aborted = None
        world.run()
        for name, prompt in prompts.items():
            said = world.said[name]
            assert said == expected_tokens(prompt, len(said), VOCAB)
            assert said or name == aborted
            chats[int(name[2:])] += [*said, rng.randrange(VOCAB)]
        world.check_nothing_is_held()
