"""Staging: what only disk has of a waiting request's prefix is read to the host while it queues (FlashGen §3.3).

The staging region bounds the host blocks that this may take. `promise` takes of it at the decision; the reads are
started later, a few at a time (`step`): first for the request with the highest response ratio (waiting against reading
time: Bidaw's disk-HRRN, FAST'26), so that short reads pass long ones, until a long one has waited long enough. What
found no room is deferred, and decided again when there is some. A read that fails, or whose block is gone, ends the
part of the prefix that is restored: the rest is computed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jserve.cache.restore import GapRead, Read, Restore
from jserve.cache.tiers import Tiers
from jserve.cache.transfer import Completion

if TYPE_CHECKING:
    from jserve.cache.gap import Gap

READS_IN_FLIGHT = 16
PATIENCE = 4.0
"""A request that has waited so many times as long as the disk takes for it is passed by none that came later."""


class StagingRegion:
    """See the module. `blocks`: its size."""

    def __init__(self, tiers: Tiers, blocks: int) -> None:
        self.tiers, self.blocks = tiers, blocks
        self.taken = 0
        """Blocks that are promised, or hold what was read for a request that still waits."""
        self.unread: dict[Restore | Gap, Callable[[Any], bool]] = {}
        """Those with blocks still to be asked for from disk, and what asks for the next one; False if it has started
        nothing."""
        self.deferred: dict[Restore, None] = {}
        """Those that would have more read for them, if there were room."""

    @property
    def room(self) -> int:
        return max(0, self.blocks - self.taken)

    @property
    def reading(self) -> int:
        """Reads under way, for whomever."""
        return self.tiers.in_flight(Read) + self.tiers.in_flight(GapRead)

    @property
    def wait_s(self) -> float:
        """What the disk takes for all that was promised, and not read yet."""
        unread = sum(reader.num_unread for reader in self.unread)
        return self.tiers.cost.stage_s(unread + self.reading)

    # --- room ---------------------------------------------------------------------------------------------------

    def promise(self, restore: Restore, blocks: int) -> None:
        """So many more blocks, up to its split, will be read for it."""
        if blocks:
            self.unread[restore] = self._read_next
            restore.staging += blocks
            self.taken += blocks

    def give_back(self, restore: Restore, blocks: int) -> None:
        restore.staging -= blocks
        self.taken -= blocks

    def leave(self, restore: Restore) -> None:
        """It needs nothing any more. Slots that are still being read into count until the reads have ended."""
        self.unread.pop(restore, None)
        self.deferred.pop(restore, None)
        self.give_back(restore, restore.staging - restore.reading)

    # --- reads --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Start reads, as many as may be under way."""
        room = READS_IN_FLIGHT - self.reading
        if room <= 0 or not self.unread:
            return
        turns = [(self._turn(reader), i, reader) for i, reader in enumerate(self.unread)]
        heapq.heapify(turns)
        while room > 0 and turns:
            reader = turns[0][2]  # to be read raises its ratio, so that it stays the first
            if reader.num_unread > 0 and reader in self.unread:
                room -= self.unread[reader](reader)
            if reader.num_unread <= 0 or reader not in self.unread:
                self.unread.pop(reader, None)
                heapq.heappop(turns)

    def _turn(self, reader: Restore | Gap) -> tuple[float, float]:
        """The least is read first."""
        waited_s = self.tiers.now_s - reader.since_s
        ratio = waited_s / self.tiers.cost.stage_s(max(1, reader.num_unread))
        return (0, reader.since_s) if ratio >= PATIENCE else (1, -ratio)

    def _read_next(self, restore: Restore) -> bool:
        """Have the next block come from disk, if it must; False if nothing was started."""
        tiers = self.tiers
        assert tiers.disk is not None
        i, keys = restore.next_read, restore.table.keys
        key, parent = keys[i], keys[i - 1] if i else None
        restore.next_read += 1
        if key in tiers.host or tiers.index.block_of(key) is not None:  # others have brought it meanwhile
            self.give_back(restore, 1)
            restore.keep(tiers.host, i + 1)
            return False
        there = tiers.disk_is_read and key in tiers.disk
        slot = tiers.host.reserve(key, parent) if there else None
        if slot is None:
            self.give_back(restore, restore.split - i)
            restore.split = restore.next_read = i
            return False
        restore.keep(tiers.host, i + 1)
        tiers.disk.learn(key, parent)
        restore.reading += 1
        tiers.stats.staged_blocks += 1
        read = Read(key, tiers.disk.version(key), restore, tiers.now_s)
        tiers.transfer.read(tiers.ticket(read), key, slot)
        return True

    def ended(self, read: Read, end: Completion) -> None:
        self._leave_slot(read)
        if self.tiers.count_read(read.key, read.version, end):
            self.tiers.host.fill(read.key, write_back=False)
        else:
            self.tiers.lose(read.key)

    def give_up(self, read: Read) -> None:
        """It has been cancelled."""
        self._leave_slot(read)
        self.tiers.count_late_read()
        self.tiers.lose(read.key)

    def _leave_slot(self, read: Read) -> None:
        if read.restore is None:
            return
        read.restore.reading -= 1
        if read.restore.ended:
            self.give_back(read.restore, 1)

    # --- waiting for them ---------------------------------------------------------------------------------------

    def advance(self, restore: Restore) -> bool:
        """Go past the blocks that are there; whether that is all of them up to the split."""
        host, keys = self.tiers.host, restore.table.keys
        while restore.settled < restore.split:
            key = keys[restore.settled]
            if self.tiers.index.block_of(key) is None:  # else nobody needs to wait for a copy of it
                if host.is_filling(key):
                    return False
                if key not in host:
                    if restore.settled >= restore.next_read:
                        return False
                    self.cut(restore)  # it was lost on its way
                    return True
            restore.settled += 1
        return True

    def cut(self, restore: Restore) -> None:
        """What is not there yet will be computed."""
        self.give_back(restore, max(0, restore.split - restore.next_read))
        restore.split = restore.settled
        restore.next_read = min(restore.next_read, restore.split)
        self.unread.pop(restore, None)
        restore.keep(self.tiers.host, restore.split)

    def mend(self) -> None:
        """Let the waiting requests know of blocks that were lost, and pin anew what they have before these."""
        if self.tiers.torn:
            self.tiers.torn = False
            for restore in self.tiers.restores:
                self.advance(restore)
