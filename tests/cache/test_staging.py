"""Whose blocks are read from disk first: short reads pass long ones, and nobody starves."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiers_world import BLOCK, make_cost

from jserve.cache.disk_tier import DiskTier
from jserve.cache.host_tier import HostTier
from jserve.cache.kv_cache import BlockTable
from jserve.cache.prefix_index import PrefixIndex
from jserve.cache.restore import Read, Restore
from jserve.cache.staging import PATIENCE, READS_IN_FLIGHT, StagingRegion
from jserve.cache.tiers import Tiers
from jserve.cache.transfer import Completion


class OneByOne:
    """A disk that reads a block in the time that the cost model says, one after the other."""

    in_turn = False

    def __init__(self) -> None:
        self.queue: list[int] = []

    def read(self, ticket: int, key: bytes, host_slot: int) -> None:
        self.queue.append(ticket)

    def poll(self) -> list[Completion]:
        return [Completion(self.queue.pop(0))] if self.queue else []

    def store(self, ticket: int, blocks: list[int], host_slots: list[int]) -> None: ...
    def load(self, ticket: int, host_slots: list[int], blocks: list[int]) -> bool:
        return False

    def write(self, ticket: int, host_slot: int, key: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...
    def cancel(self, ticket: int) -> None: ...
    def close(self) -> None: ...


class Disk:
    """Requests whose whole prefix is on disk, and time in units of one block's read."""

    def __init__(self, blocks: int) -> None:
        files = [bytes([who, i // 256, i % 256]) for who in range(64) for i in range(blocks)]
        disk = DiskTier(len(files), present=files)
        self.tiers = Tiers(PrefixIndex(), HostTier(len(files)), disk, OneByOne(), make_cost(), note=lambda _: None)
        self.staging = StagingRegion(self.tiers, len(files))
        self.block_s = self.tiers.cost.stage_s(1)
        self.now = 0
        self.read_at: dict[bytes, int] = {}

    def ask(self, who: int, blocks: int) -> Restore:
        keys = [bytes([who, i // 256, i % 256]) for i in range(blocks)]
        restore = Restore(BlockTable(b"", keys=keys), blocks * BLOCK, self.tiers.now_s, split=blocks, wanted=blocks)
        self.tiers.restores[restore] = None
        self.staging.promise(restore, blocks)
        return restore

    def tick(self) -> None:
        self.staging.step()
        self.now += 1
        self.tiers.set_now(self.now * self.block_s)
        for read, end in self.tiers.ended():
            assert isinstance(read, Read)
            self.staging.ended(read, end)
            self.read_at[read.key] = self.now

    def end_of(self, restore: Restore) -> int | None:
        """When its last block came."""
        return self.read_at.get(restore.table.keys[-1])


def test_a_short_read_passes_a_long_one() -> None:
    disk = Disk(200)
    long = disk.ask(0, 200)
    for _ in range(30):
        disk.tick()
    short = disk.ask(1, 3)
    for _ in range(READS_IN_FLIGHT + 10):
        disk.tick()
    assert disk.end_of(short) is not None
    assert disk.end_of(long) is None


def test_of_equal_reads_the_first_comes_first() -> None:
    disk = Disk(20)
    asked = [disk.ask(who, 20) for who in range(4)]
    for _ in range(80):
        disk.tick()
    ends = [disk.end_of(restore) for restore in asked]
    assert ends == sorted(ends, key=lambda end: end or 0)
    assert ends[-1] == 80


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=62))
@example(10, [(1, 2)] * 62)
def test_a_long_read_ends_within_a_bound_however_many_short_ones_follow(
    blocks: int, later: list[tuple[int, int]]
) -> None:
    """It waits PATIENCE times its own length, then for what the disk had begun, then only for itself: whoever came
    later waits until it has all its blocks."""
    disk = Disk(max(blocks, READS_IN_FLIGHT))
    disk.ask(63, READS_IN_FLIGHT)
    disk.tick()
    long = disk.ask(0, blocks)
    who = 1
    wait, length = later[0]
    while disk.end_of(long) is None:
        wait -= 1
        if wait <= 0 and who < len(later):
            disk.ask(who, length)
            who += 1
            wait, length = later[who % len(later)]
        disk.tick()
        assert disk.now <= (PATIENCE + 1) * blocks + READS_IN_FLIGHT
