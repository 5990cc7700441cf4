"""Write-through from device to host while inference runs (FlashGen §3.2.1), within a budget for each step.

A full block waits here from when it can be found on the device until the copy of its step: so reclaiming a device block
never needs a copy. What the host has no slot for, or what has left the device before its turn, is skipped, and tried
again when a request uses it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from jserve.cache.kv_cache import BlockTable
from jserve.cache.restore import Store
from jserve.cache.tiers import Tiers
from jserve.cache.transfer import Completion

STORES_IN_FLIGHT = 4
SLACK = 64

Source = tuple[bytes, bytes | None, int]
"""A block to be copied: its key, that of the block before it, and where it is on the device."""


def _source(table: BlockTable, i: int, block: int) -> Source:
    return table.keys[i], table.keys[i - 1] if i else None, block


class WriteThrough:
    """See the module. `budget`: blocks a step."""

    def __init__(self, tiers: Tiers, budget: int) -> None:
        self.tiers, self.budget = tiers, budget
        self._waiting: deque[Source] = deque()

    def __len__(self) -> int:
        """Blocks that wait for their turn, and maybe some that need none any more."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether blocks wait that can be copied now."""
        return bool(self._waiting) and self.tiers.host_is_written

    def add(self, table: BlockTable, i: int) -> None:
        """Block `i` of the table has become findable."""
        self._waiting.append(_source(table, i, table.blocks[i]))

    def add_again(self, table: BlockTable, found: list[int | None], most: int) -> None:
        """What the device has kept and the host has not, because its store was skipped or it was evicted."""
        if len(self) >= most:
            return  # all of it waits already, or more than the host can take
        for i in range(self.tiers.host.reach(table.keys, len(found)), len(found)):
            block = found[i]
            if block is not None:
                self._waiting.append(_source(table, i, block))

    def _forget_stale(self) -> None:
        """Those that have left the device, and those that wait twice: no more are left than the device holds."""
        here = [source for source in dict.fromkeys(self._waiting) if self.tiers.index.block_of(source[0]) == source[2]]
        self.tiers.stats.skipped_stores += len(self) - len(here)
        self._waiting = deque(here)

    def step(self, steps: int = 1) -> None:
        """Copy what is due after so many steps."""
        if len(self) > 2 * len(self.tiers.index) + SLACK:  # nothing is copied for a while: the host link has failed
            self._forget_stale()
        if self.busy and self.tiers.in_flight(Store) < STORES_IN_FLIGHT:
            self._store(self._due(self.budget * steps))

    def _due(self, most: int) -> Iterator[Source]:
        """What the budget allows. What has come to the host meanwhile or left the device costs none of it, so that no
        more can wait than the device holds."""
        due = 0
        while self._waiting and due < most:
            key, parent, block = self._waiting.popleft()
            if key in self.tiers.host:
                continue
            if self.tiers.index.block_of(key) != block:
                self.tiers.stats.skipped_stores += 1
                continue
            due += 1
            yield key, parent, block

    def store_missing(self, table: BlockTable) -> None:
        """Copy to the host what it lacks of the table's full blocks, whatever the budget says."""
        host, full = self.tiers.host, table.num_published
        self._store(
            _source(table, i, table.blocks[i])
            for i in range(host.reach(table.keys, full), full)
            if table.keys[i] not in host
        )

    def _store(self, blocks: Iterable[Source]) -> None:
        """Copy to the host what it has slots for."""
        host, due_s, written = self.tiers.host, self.tiers.returns.due_s, self.tiers.host_is_written
        keys: list[bytes] = []
        slots: list[int] = []
        sources: list[int] = []
        for key, parent, block in blocks:
            # Without its parent on the host nobody could find it there.
            there = written and (parent is None or parent in host)
            slot = host.reserve(key, parent, due_s(key)) if there else None
            if slot is None:
                self.tiers.stats.skipped_stores += 1
                continue
            keys.append(key)
            slots.append(slot)
            sources.append(block)
        if keys:
            self.tiers.transfer.store(self.tiers.ticket(Store(keys, self.tiers.now_s)), sources, slots)

    def ended(self, store: Store, end: Completion) -> None:
        tiers, stats = self.tiers, self.tiers.stats
        stats.store_s += end.seconds
        if end.error is not None:
            self._fail(store, end.error)
            return
        host, disk = tiers.host, tiers.disk
        host.writing.works()
        for key in store.keys:
            host.fill(key, write_back=disk is not None and key not in disk)
        stats.stored_blocks += len(store.keys)
        stats.stored_bytes += end.num_bytes
        tiers.observe(tiers.cost.device_to_host, end, len(store.keys) / tiers.cost.blocks_per_copy)

    def give_up(self, store: Store) -> None:
        """It has been cancelled."""
        self._fail(store, "a copy from the device takes too long")

    def _fail(self, store: Store, error: str) -> None:
        tiers = self.tiers
        tiers.stats.failed_stores += 1
        for key in store.keys:
            tiers.lose(key)
        tiers.fault(tiers.host, tiers.host.writing, "written", error)
