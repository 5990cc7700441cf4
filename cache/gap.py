"""Gaps: the end of a prompt's prefix comes from host and disk while its front is computed (Cake, arXiv 2410.03065).

A request with a gap computes up to its `start`, then waits, outside of any batch, until all blocks from there to its
`end` are on the device, and goes on after them. From its arrival on, what only disk has of the gap is read, the last
block first, into host slots of its own: nobody else could find it there, for a tier holds no block without those before
it. Once the request has its device blocks, what has come is copied into them, one copy at a time.

A block that does not come moves the start behind it: it is computed, with all before it. So whatever fails, hangs or
comes late costs computation alone. A request that has come to the start holds a slot and its blocks: it waits for no
longer than computing what is missing would take. `close` ends a gap in any state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from jserve.cache.kv_cache import BlockTable
from jserve.cache.restore import LATE, GapLoad, GapRead
from jserve.cache.staging import StagingRegion
from jserve.cache.tiers import Tiers
from jserve.cache.transfer import Completion


@dataclass(slots=True, eq=False)
class Gap:
    """Blocks from `start` to `end` of one request's prompt. It hangs on the request's block table."""

    table: BlockTable
    start: int
    end: int
    above_disk: int
    """Those before it come from the host tier, those from it on from disk."""
    since_s: float
    """When the request came."""
    unread: int
    """The first block behind those that are still to be asked for from disk."""
    reading: dict[int, int] = field(default_factory=dict)
    """Tickets of the reads under way, by block."""
    slots: dict[int, int] = field(default_factory=dict)
    """Host slots that are read into, or were, by block. Those of a copy to the device are the copy's."""
    to_load: set[int] = field(default_factory=set)
    """Blocks that have come to the host, or are in its tier."""
    load_ticket: int | None = None
    there: set[int] = field(default_factory=set)
    """Blocks that are on the device."""
    pin: bytes | None = None
    """The last of its blocks in the host tier."""
    admitted: bool = False
    deadline_s: float = math.inf
    """Of the wait for it."""

    @property
    def first_read(self) -> int:
        return max(self.start, self.above_disk)

    @property
    def num_unread(self) -> int:
        """Blocks that are still to be asked for from disk."""
        return max(0, self.unread - self.first_read)

    @property
    def last_missing(self) -> int:
        """The last of its blocks that is not on the device; the one before its start if all are."""
        return next((i for i in reversed(range(self.start, self.end)) if i not in self.there), self.start - 1)

    @property
    def is_closed(self) -> bool:
        return len(self.there) == self.end - self.start


class Gaps:
    """See the module. Its reads take turns with those of `staging`, and its slots are of the same region."""

    def __init__(self, tiers: Tiers, staging: StagingRegion) -> None:
        self.tiers, self.staging = tiers, staging
        self.open: dict[Gap, None] = {}

    def add(self, table: BlockTable, start: int, end: int, host: int) -> Gap:
        """Of a request that has arrived, and of which the host tier has the first `host` blocks."""
        gap = Gap(table, start, end, max(start, min(host, end)), self.tiers.now_s, unread=end)
        gap.to_load = set(range(start, gap.above_disk))
        ready = next((i for i in reversed(range(start, gap.above_disk)) if self._is_ready(gap, i)), None)
        if ready is not None:
            gap.pin = table.keys[ready]
            self.tiers.host.pin(gap.pin)
        self.staging.taken += end - gap.above_disk
        if gap.num_unread:
            self.staging.unread[gap] = self._read_next
        self.open[gap] = None
        table.gap = gap
        self.tiers.stats.gaps += 1
        return gap

    def _is_ready(self, gap: Gap, i: int) -> bool:
        return self.tiers.host.is_ready(gap.table.keys[i])

    # --- disk to host -------------------------------------------------------------------------------------------

    def _read_next(self, gap: Gap) -> bool:
        """Start to read the last block that is unread; False if that is not possible."""
        tiers, i = self.tiers, gap.unread - 1
        key = gap.table.keys[i]
        slot = tiers.host.borrow() if tiers.disk is not None and tiers.disk_is_read and key in tiers.disk else None
        if slot is None:
            self._lose(gap, i)
            return False
        assert tiers.disk is not None
        tiers.disk.learn(key, gap.table.keys[i - 1])
        gap.unread = i
        gap.slots[i] = slot
        gap.reading[i] = tiers.ticket(GapRead(key, tiers.disk.version(key), gap, i, tiers.now_s))
        tiers.stats.staged_blocks += 1
        tiers.transfer.read(gap.reading[i], key, slot)
        return True

    def read_ended(self, read: GapRead, end: Completion) -> None:
        del read.gap.reading[read.block]
        if self.tiers.count_read(read.key, read.version, end):
            read.gap.to_load.add(read.block)
        else:
            self._lose(read.gap, read.block)

    def give_up_read(self, read: GapRead) -> None:
        """It has been cancelled."""
        del read.gap.reading[read.block]
        self.tiers.count_late_read()
        self._lose(read.gap, read.block)

    # --- host to device -----------------------------------------------------------------------------------------

    def admitted(self, gap: Gap, there: int) -> None:
        """The request has its device blocks, and the KV of the first `there`, or soon."""
        gap.admitted = True
        if there > gap.start:
            self._start_at(gap, there)
        if gap in self.open:
            self._load(gap)

    def step(self) -> None:
        """Copy on what has come."""
        for gap in list(self.open):
            if gap.admitted and gap.load_ticket is None:
                self._load(gap)

    def _load(self, gap: Gap) -> None:
        host, keys = self.tiers.host, gap.table.keys
        if not self.tiers.host_is_read:
            self.expire(gap)
            return
        gone = [i for i in gap.to_load if i not in gap.slots and keys[i] not in host]
        if gone:
            self._lose(gap, max(gone))
        if gap not in self.open:
            return
        blocks = sorted(i for i in gap.to_load if i in gap.slots or self._is_ready(gap, i))
        if not blocks:
            return
        pins = [keys[i] for i in blocks if i not in gap.slots]
        for key in pins:
            host.pin(key)
        sources = [gap.slots[i] if i in gap.slots else host.slot(keys[i]) for i in blocks]
        own = [gap.slots.pop(i) for i in blocks if i in gap.slots]
        gap.to_load.difference_update(blocks)
        load = GapLoad(gap, blocks, pins, own, self.tiers.now_s)
        ticket = self.tiers.ticket(load)
        load.ordered = self.tiers.transfer.load(ticket, sources, [gap.table.blocks[i] for i in blocks])
        if load.ordered:  # the steps to come may read them
            gap.there.update(blocks)
        else:
            gap.load_ticket = ticket

    def load_ended(self, load: GapLoad, end: Completion) -> None:
        self._free(load)
        here = self.tiers.count_load(len(load.blocks), end)
        if load.ordered:
            return
        load.gap.load_ticket = None
        if here:
            load.gap.there.update(load.blocks)
        else:
            self._lose(load.gap, load.blocks[-1])

    def give_up_load(self, load: GapLoad) -> None:
        """It has been cancelled."""
        self._free(load)
        self.tiers.count_failed_load(LATE)
        if not load.ordered:
            load.gap.load_ticket = None
            self._lose(load.gap, load.blocks[-1])

    def _free(self, load: GapLoad) -> None:
        for key in load.pins:
            self.tiers.host.unpin(key)
        for slot in load.slots:
            self._give_back(slot)

    def _give_back(self, slot: int) -> None:
        self.tiers.host.give_back(slot)
        self.staging.taken -= 1

    # --- its end ------------------------------------------------------------------------------------------------

    def expire(self, gap: Gap) -> None:
        """Nobody waits any longer for what is missing."""
        self._lose(gap, gap.last_missing)

    def _lose(self, gap: Gap, i: int) -> None:
        """This block does not come."""
        if gap in self.open and i >= gap.start:
            self._start_at(gap, i + 1)

    def _start_at(self, gap: Gap, start: int) -> None:
        """The blocks before this one are computed, or were found."""
        if start >= gap.end:
            self.close(gap.table)
            return
        if gap.load_ticket is not None:
            load = self.tiers.under_way[gap.load_ticket]
            assert isinstance(load, GapLoad)
            if load.blocks[0] < start:  # it must not write where the computation does
                self._cancel_load(gap)
                self._start_at(gap, max(start, load.blocks[-1] + 1))
                return
        unread = gap.num_unread
        gap.start = start
        gap.deadline_s = math.inf  # it computes on, and may have to wait again
        self.staging.taken -= unread - gap.num_unread
        gap.unread = max(gap.unread, gap.first_read)
        self._drop(gap, [i for i in gap.slots if i < start])
        gap.to_load = {i for i in gap.to_load if i >= start}
        gap.there = {i for i in gap.there if i >= start}

    def _drop(self, gap: Gap, blocks: list[int]) -> None:
        for i in blocks:
            ticket = gap.reading.pop(i, None)
            if ticket is not None:
                self.tiers.cancel(ticket)
            self._give_back(gap.slots.pop(i))

    def _cancel_load(self, gap: Gap) -> None:
        assert gap.load_ticket is not None
        load = self.tiers.cancel(gap.load_ticket)
        assert isinstance(load, GapLoad)
        gap.load_ticket = None
        self._free(load)

    def close(self, table: BlockTable) -> None:
        """The one end of every gap, in whatever state: nothing is read, copied or kept for it any more."""
        gap, table.gap = table.gap, None
        if gap is None:
            return
        del self.open[gap]
        self.staging.unread.pop(gap, None)
        self.staging.taken -= gap.num_unread
        gap.unread = 0
        self._drop(gap, list(gap.slots))
        if gap.load_ticket is not None:
            self._cancel_load(gap)
        if gap.pin is not None:
            self.tiers.host.unpin(gap.pin)
