"""The tiers below the device, and the copies under way between them: what the parts of the hierarchy share.

Every operation of the Transfer door has a ticket here, and the part that has started it is told of its end
(`TieredCache.poll`). A completion that nobody waits for any more finds no ticket and is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from jserve.cache.cost import CostModel, LinkCost
from jserve.cache.disk_tier import DiskTier
from jserve.cache.host_tier import HostTier
from jserve.cache.pause import Pause
from jserve.cache.prefix_index import PrefixIndex
from jserve.cache.restore import Operation, Restore
from jserve.cache.returns import Returns
from jserve.cache.tier_stats import TierStats
from jserve.cache.transfer import Completion, Transfer


@dataclass(slots=True)
class Tiers:
    """See the module. `index` is that of the device."""

    index: PrefixIndex
    host: HostTier
    disk: DiskTier | None
    transfer: Transfer
    cost: CostModel
    note: Callable[[str], None]
    """Tells people of a fault, in a line."""
    stats: TierStats = field(default_factory=TierStats)
    now_s: float = 0.0
    """As of the last poll."""
    returns: Returns = field(init=False)
    """Of conversations whose blocks the tiers may have."""
    restores: dict[Restore, None] = field(default_factory=dict)
    """Of the requests that wait or load, in order of arrival."""
    torn: bool = False
    """Whether a block was lost since they were last told."""
    under_way: dict[int, Operation] = field(default_factory=dict)
    """By ticket."""
    _in_flight: Counter[type[Operation]] = field(default_factory=Counter)
    """How many of each kind these are."""
    _next_ticket: int = 0

    def __post_init__(self) -> None:
        self.returns = Returns(self.host.num_slots + (self.disk.num_blocks if self.disk is not None else 0))

    def set_now(self, now_s: float) -> None:
        """At each poll."""
        self.now_s = now_s
        self.host.set_now(now_s)
        if self.disk is not None:
            self.disk.set_now(now_s)

    @property
    def host_is_read(self) -> bool:
        """Whether the link to the device can be trusted at the moment."""
        return self.host.reading.is_over(self.now_s)

    @property
    def host_is_written(self) -> bool:
        return self.host.writing.is_over(self.now_s)

    @property
    def disk_is_read(self) -> bool:
        return self.disk is not None and self.disk.reading.is_over(self.now_s)

    @property
    def disk_is_written(self) -> bool:
        return self.disk is not None and self.disk.writing.is_over(self.now_s)

    def ticket(self, operation: Operation) -> int:
        """For an operation that starts now."""
        self._next_ticket += 1
        self.under_way[self._next_ticket] = operation
        self._in_flight[type(operation)] += 1
        return self._next_ticket

    def in_flight(self, kind: type[Operation]) -> int:
        return self._in_flight[kind]

    def ended(self) -> Iterator[tuple[Operation, Completion]]:
        """What has ended since the last call, and somebody has waited for."""
        for completion in self.transfer.poll():
            if completion.ticket in self.under_way:
                yield self._forget(completion.ticket), completion

    def cancel(self, ticket: int) -> Operation:
        """It touches nothing any more, and its end is not told."""
        self.transfer.cancel(ticket)
        return self._forget(ticket)

    def _forget(self, ticket: int) -> Operation:
        operation = self.under_way.pop(ticket)
        self._in_flight[type(operation)] -= 1
        return operation

    def lose(self, key: bytes) -> None:
        """A block that was on its way to the host has not come."""
        for restore in self.restores:
            if restore.pin == key:  # the slot goes, and its pins with it
                restore.pin = None
        self.host.drop(key)
        self.torn = True

    def observe(self, link: LinkCost, end: Completion, copies: float) -> None:
        if end.seconds > 0:
            link.observe(end.num_bytes, copies, end.seconds, end.least_s)

    def count_load(self, blocks: int, end: Completion) -> bool:
        """A copy of so many blocks to the device has ended; whether they are there."""
        stats = self.stats
        stats.load_s += end.seconds
        if end.error is not None:
            self.count_failed_load(end.error)
            return False
        self.host.reading.works()
        stats.loaded_blocks += blocks
        stats.loaded_bytes += end.num_bytes
        self.observe(self.cost.host_to_device, end, blocks / self.cost.blocks_per_copy)
        return True

    def count_failed_load(self, error: str) -> None:
        self.stats.failed_loads += 1
        self.fault(self.host, self.host.reading, "read", error)

    def count_read(self, key: bytes, version: int | None, end: Completion) -> bool:
        """The read of this copy of a block has ended; whether it is there."""
        assert self.disk is not None
        stats = self.stats
        stats.read_s += end.seconds
        if end.error is None:
            self.disk.reading.works()
            stats.read_blocks += 1
            stats.read_bytes += end.num_bytes
            self.observe(self.cost.disk_read, end, 1)
            return True
        stats.failed_reads += 1
        stats.corrupt_blocks += end.corrupt
        self.disk.drop(key, version)  # computed again, it is written again, which mends what is damaged
        if end.device_fault:
            self.fault(self.disk, self.disk.reading, "read", end.error)
        return False

    def count_late_read(self) -> None:
        """A read was cancelled because it took too long."""
        assert self.disk is not None
        self.stats.failed_reads += 1
        self.fault(self.disk, self.disk.reading, "read", "a read takes too long")

    def fault(self, tier: HostTier | DiskTier, pause: Pause, doing: str, error: str) -> None:
        """The tier as such has failed, and will not be used this way for a while."""
        if not pause.is_over(self.now_s):
            return
        tier.faults += 1
        if pause.fault(self.now_s):
            self.note(f"the {tier.name} tier is not {doing} for a while, and its share is computed again: {error}")
