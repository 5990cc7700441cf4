"""Conversations that will soon be back are read from disk before they are, and nobody waits longer for that."""

from __future__ import annotations

import random

import pytest
from tiers_world import BLOCK, VOCAB, World, instant, make_cost, prompt_of

from jserve.cache.disk_tier import DiskTier
from jserve.cache.host_tier import HostTier
from jserve.cache.prefix_index import PrefixIndex
from jserve.cache.read_ahead import MARGIN, ReadAhead
from jserve.cache.restore import Read
from jserve.cache.returns import ENOUGH, GapModel
from jserve.cache.staging import StagingRegion
from jserve.cache.tiers import Tiers
from jserve.simulated import SimulatedClock, SimulatedExecutor, SimulatedTransfer


def key(chat: int, i: int) -> bytes:
    return bytes([chat, i])


def chain(chat: int, blocks: int = 3) -> list[bytes]:
    return [key(chat, i) for i in range(blocks)]


class Sleepers:
    """A host of a few slots over a disk that has everything, and a model that has learned: a second for each token."""

    def __init__(self, slots: int) -> None:
        self.host = HostTier(slots, "returns")
        files = {key(chat, i): [0] * BLOCK for chat in range(9) for i in range(9)}
        self.disk = DiskTier(1000, present=files)
        clock = SimulatedClock()
        transfer = SimulatedTransfer(clock, SimulatedExecutor(clock, 1, BLOCK, VOCAB), slots, instant, disk=files)
        tiers = Tiers(PrefixIndex(), self.host, self.disk, transfer, make_cost(), note=lambda _: None)
        self.tiers, self.stats = tiers, tiers.stats
        self.ahead = ReadAhead(tiers, StagingRegion(tiers, 0), seconds=1e-6)
        for i in range(2 * ENOUGH):
            tiers.returns.model.observe(10 + i, 10.0 + i)

    def run(self, chat: int, answer_tokens: int, now_s: float, blocks: int = 3) -> None:
        """A turn that ends now: all of its conversation is on the host."""
        keys = chain(chat, blocks)
        self.tiers.set_now(now_s)
        self.ahead.arrived(keys, 100, {self.host.reach(keys, blocks), blocks})
        for i, name in enumerate(keys):
            if name not in self.host:
                self.host.reserve(name, keys[i - 1] if i else None)
                self.host.fill(name, write_back=False)
        self.ahead.ended(keys, 99, answer_tokens)

    def read(self, now_s: float) -> list[bytes]:
        """All that is worth to be read now."""
        self.tiers.set_now(now_s)
        found: list[bytes] = []
        self.ahead.step()
        while self.tiers.under_way:
            for read, end in self.tiers.ended():
                assert isinstance(read, Read)
                assert not self.tiers.under_way, "one at a time is what the seconds allow"
                self.ahead.staging.ended(read, end)
                found.append(read.key)
            self.ahead.step()
        return found

    def on_host(self, chat: int) -> int:
        return self.host.reach(chain(chat), 3)


def test_what_returns_soon_is_read_and_what_returns_late_makes_room() -> None:
    tiers = Sleepers(6)
    tiers.run(0, 60, 0.0)
    tiers.run(1, 400, 0.0)
    tiers.run(2, 90, 0.0)  # 1 goes, whose return is farthest away
    assert [tiers.on_host(chat) for chat in range(3)] == [3, 0, 3]
    assert tiers.read(5.0) == []
    assert tiers.read(330.0) == chain(1)  # the others are long overdue
    assert [tiers.on_host(chat) for chat in range(3)] == [0, 3, 3]
    assert tiers.stats.read_ahead_blocks == 3
    tiers.run(1, 50, 390.0)
    assert (tiers.stats.read_ahead_hits, tiers.stats.read_ahead_wasted) == (3, 0)


def test_what_was_read_for_nothing_is_counted() -> None:
    tiers = Sleepers(3)
    tiers.run(0, 400, 0.0)
    tiers.run(1, 40, 0.0)
    assert tiers.read(380.0) == chain(0)
    tiers.run(2, 30, 1500.0)
    assert (tiers.stats.read_ahead_hits, tiers.stats.read_ahead_wasted) == (0, 3)


def test_nothing_is_evicted_for_what_is_hardly_sooner() -> None:
    tiers = Sleepers(3)
    tiers.run(0, 100, 0.0)
    tiers.run(1, 60, 0.0)
    assert tiers.on_host(0) == 0
    at_s = 75.0  # 25 s before the one's time, 15 s after the other's
    assert tiers.read(at_s) == []
    while not tiers.read(at_s):
        at_s += 1
    error_s = tiers.tiers.returns.model.error_s
    assert at_s - 60 > MARGIN * (100 - at_s) + error_s >= at_s - 1 - 60 - MARGIN


def test_the_less_predictions_can_be_trusted_the_less_is_read() -> None:
    tiers = Sleepers(3)
    tiers.run(0, 400, 0.0)
    tiers.run(1, 40, 0.0)
    tiers.tiers.returns.model.error_s = 341.0
    assert tiers.read(380.0) == []
    tiers.tiers.returns.model.error_s = 50.0
    assert tiers.read(380.0) == chain(0)


def test_blank_slots_are_filled_whatever_is_known() -> None:
    tiers = Sleepers(3)
    tiers.run(0, 400, 0.0)
    tiers.run(1, 40, 0.0)
    for name in reversed(chain(1)):
        tiers.host.drop(name)
    assert tiers.read(1.0) == [*chain(1)]  # it is nearer than the other


def test_what_disk_has_not_is_not_asked_for_again_and_again() -> None:
    tiers = Sleepers(3)
    tiers.run(0, 400, 0.0)
    tiers.run(1, 40, 0.0)
    tiers.disk.drop(key(0, 1), tiers.disk.version(key(0, 1)))
    assert tiers.read(390.0) == [key(0, 0)]
    assert tiers.read(391.0) == []


def test_the_same_question_from_others_teaches_nothing() -> None:
    world = World(eviction="returns", read_ahead_s=1.0)
    for user in range(5):
        world.ask(f"user {user}", prompt_of(0, 4 * BLOCK + 1), 1)
        world.clock.wait(1.0)
    assert world.cache.tiers.returns.model.seen == 0
    world.ask("goes on", [*prompt_of(0, 4 * BLOCK + 1), 1, 2, 3], 1)
    assert world.cache.tiers.returns.model.seen == 1


def test_pinned_blocks_stay_whatever_returns() -> None:
    tiers = Sleepers(3)
    tiers.run(0, 400, 0.0)
    tiers.run(1, 40, 0.0)
    tiers.host.pin(key(1, 2))
    assert tiers.read(390.0) == []
    tiers.host.unpin(key(1, 2))
    assert tiers.read(390.0) == chain(0)


def test_reading_ahead_by_turns_never_thrashes() -> None:
    """Nobody comes, and time passes: no conversation is read twice on its way from far to near."""
    tiers = Sleepers(9)
    rng = random.Random(0)
    for chat in range(8):
        tiers.run(chat, rng.randrange(20, 500), 0.0)
    read = [block for now_s in range(3000) for block in tiers.read(float(now_s))]
    assert len(read) == len(set(read))


def talk(world: World, chats: int, turns: int, *, answer: int = 8, seed: int = 0) -> None:
    """Each conversation returns after a time that its answers tell, and the next one asks meanwhile."""
    rng = random.Random(seed)
    histories = {chat: prompt_of(chat, 18) for chat in range(chats)}
    due = sorted((rng.uniform(0, 20), chat) for chat in range(chats))
    for turn in range(turns):
        due_s, chat = due.pop(0)
        while world.clock.now() < due_s:
            world.clock.wait(min(0.5, due_s - world.clock.now()))
            world.cache.poll(world.clock.now())
        tokens = rng.randrange(1, answer)
        if len(histories[chat]) + tokens > 44:
            histories[chat] = prompt_of(100 * turn, 18)
        said = world.ask(f"{chat} {turn}", histories[chat], tokens)
        histories[chat] = said + [rng.randrange(VOCAB) for _ in range(2)]
        due.append((world.clock.now() + 5.0 * tokens + rng.random(), chat))
        due.sort()


def test_conversations_find_on_the_host_what_only_disk_had() -> None:
    def hits(read_ahead_s: float, eviction: str) -> tuple[int, int]:
        world = World(device=12, host=40, disk_blocks=400, eviction=eviction, read_ahead_s=read_ahead_s)
        talk(world, chats=9, turns=160)
        world.check_nothing_is_held()
        stats = world.cache.tier_stats
        assert (stats.read_ahead_hits > 0) == (read_ahead_s > 0)
        assert stats.read_ahead_hits + stats.read_ahead_wasted <= stats.read_ahead_blocks <= stats.read_blocks
        return stats.host_hit_tokens, stats.disk_hit_tokens

    plain, by_return, ahead = hits(0.0, "lru"), hits(0.0, "returns"), hits(1.0, "returns")
    assert plain[0] < by_return[0] < ahead[0]
    assert plain[1] > by_return[1] > ahead[1]


def test_a_request_reads_before_anything_is_read_ahead() -> None:
    """So few reads are under way for sleepers that a request waits for them alone."""
    world = World(device=12, host=22, disk_blocks=400, eviction="returns", read_ahead_s=2e-6)
    talk(world, chats=9, turns=80)
    world.transfer._copy_s = lambda kind, blocks: 0.2 if kind == "read" else 0.0
    waited = 0
    for turn in range(40):
        world.clock.wait(3.0)
        world.cache.poll(world.clock.now())
        ahead = [op for op in world.cache.tiers.under_way.values() if isinstance(op, Read) and op.restore is None]
        assert len(ahead) <= 2
        world.add(f"late {turn}", prompt_of(turn % 9, 18))
        world.step()
        demand = [op for op in world.cache.tiers.under_way.values() if isinstance(op, Read) and op.restore is not None]
        if demand:
            waited += 1
            now = [op for op in world.cache.tiers.under_way.values() if isinstance(op, Read) and op.restore is None]
            assert set(map(id, now)) <= set(map(id, ahead))
        world.run()
    assert waited
    world.check_nothing_is_held()


def test_a_disk_that_fails_while_it_reads_ahead_costs_nobody_a_token() -> None:
    broken: set[str] = set()
    world = World(
        device=12, host=22, disk_blocks=400, eviction="returns", read_ahead_s=1.0, fails=lambda kind: kind in broken
    )
    talk(world, chats=9, turns=60)
    broken.add("read")
    talk(world, chats=9, turns=20, seed=1)
    assert world.cache.tier_stats.failed_reads > 0
    assert any("not read for a while" in note for note in world.notes)
    broken.clear()
    before = world.cache.tier_stats.read_ahead_blocks
    talk(world, chats=9, turns=80, seed=2)
    assert world.cache.tier_stats.read_ahead_blocks > before
    world.check_nothing_is_held()


def test_a_read_ahead_that_never_ends_is_given_up() -> None:
    world = World(device=12, host=22, disk_blocks=400, eviction="returns", read_ahead_s=1.0, wait_limit_s=2.0)
    talk(world, chats=9, turns=60)
    world.transfer._copy_s = lambda kind, blocks: 1e9 if kind == "read" else 0.0
    talk(world, chats=9, turns=40, seed=1)
    assert world.cache.tier_stats.failed_reads > 0
    world.run()
    world.check_nothing_is_held()


class Guesses(GapModel):
    """Predictions at random, so that much is read ahead, and much of it for nothing."""

    rng = random.Random(0)

    def gap_s(self, answer_tokens: int) -> float:
        return 40 * self.rng.random()


@pytest.mark.parametrize("seed", range(5))
def test_whatever_fails_while_much_is_read_ahead_nobody_is_told_a_wrong_token(seed: int) -> None:
    rng = random.Random(seed)
    broken: set[str] = set()
    slow_s = {kind: rng.choice([0.0, 0.003, 0.03, 0.3]) for kind in ("store", "load", "read", "write")}
    world = World(
        device=12,
        host=rng.choice([14, 20, 40]),
        disk_blocks=rng.choice([40, 400]),
        eviction=rng.choice(["lru", "fifo", "returns"]),
        read_ahead_s=rng.choice([1e-6, 1.0]),
        wait_limit_s=0.1,
        copy_s=lambda kind, blocks: slow_s[kind] * rng.random(),
        fails=lambda kind: kind in broken and rng.random() < 0.5,
    )
    world.cache.tiers.returns.model = Guesses()
    world.cache.ahead.margin, world.cache.ahead.margin_errors = 1.0, 0.0
    for phase in range(4):
        talk(world, chats=9, turns=30, seed=phase)
        for key in [key for key in world.transfer.disk if rng.random() < 0.1]:
            del world.transfer.disk[key]
        broken ^= {rng.choice(["store", "load", "read", "write"])}
    world.run()
    world.check_nothing_is_held()
    assert world.cache.tier_stats.read_ahead_blocks > 0


def test_an_engine_that_closes_reads_nothing_ahead() -> None:
    world = World(device=12, host=22, disk_blocks=400, eviction="returns", read_ahead_s=1.0)
    talk(world, chats=9, turns=60)
    world.cache.drain()
    before = world.cache.tier_stats.read_ahead_blocks
    assert before > 0
    for _ in range(50):
        world.clock.wait(1.0)
        world.cache.poll(world.clock.now())
    assert world.cache.tier_stats.read_ahead_blocks == before


def test_after_a_restart_nothing_is_read_ahead_until_something_sleeps() -> None:
    before = World(device=12, host=22, disk_blocks=400)
    talk(before, chats=5, turns=20)
    before.engine.close()
    after = World(device=12, host=22, disk_blocks=400, eviction="returns", read_ahead_s=1.0, disk=before.transfer.disk)
    for _ in range(10):
        after.clock.wait(10.0)
        after.cache.poll(after.clock.now())
    assert after.cache.tier_stats.read_blocks == 0
    history = after.ask("first", prompt_of(0, 18))
    assert after.cached["first"] == 17 // BLOCK * BLOCK
    assert len(history) == 22
