"""From host to disk in the background: a few at a time of the blocks that carry the write-back bit (FlashGen §3.2)."""

from __future__ import annotations

from jserve.cache.restore import Write
from jserve.cache.tiers import Tiers
from jserve.cache.transfer import Completion

WRITES_IN_FLIGHT = 4


class WriteBack:
    """See the module. Without a disk it does nothing."""

    def __init__(self, tiers: Tiers) -> None:
        self.tiers = tiers

    @property
    def busy(self) -> bool:
        """Whether blocks wait for disk that can be written now."""
        return self.tiers.disk_is_written and self.tiers.host.write_back_backlog > 0

    def step(self) -> None:
        """Start as many writes as may be under way."""
        tiers, host, disk = self.tiers, self.tiers.host, self.tiers.disk
        if disk is None or not tiers.disk_is_written:
            return
        room = WRITES_IN_FLIGHT - tiers.in_flight(Write)
        while room > 0 and (key := host.next_write_back()) is not None:
            if key in disk:
                disk.learn(key, host.parent(key))
                continue
            victims = disk.reserve()
            if victims is None:
                host.write_back_again(key)
                return
            for victim in victims:
                tiers.transfer.delete(victim)
            host.pin(key)
            tiers.transfer.write(tiers.ticket(Write(key, tiers.now_s)), host.slot(key), key)
            room -= 1

    def ended(self, write: Write, end: Completion) -> None:
        tiers = self.tiers
        assert tiers.disk is not None
        tiers.stats.write_s += end.seconds
        if end.error is not None:
            self._fail(write, end.error)
            return
        tiers.host.unpin(write.key)
        tiers.disk.writing.works()
        tiers.disk.add(write.key, tiers.host.parent(write.key), tiers.returns.due_s(write.key))
        tiers.stats.written_blocks += 1
        tiers.stats.written_bytes += end.num_bytes
        tiers.observe(tiers.cost.disk_write, end, 1)

    def give_up(self, write: Write) -> None:
        """It has been cancelled."""
        self._fail(write, "a write takes too long")

    def _fail(self, write: Write, error: str) -> None:
        tiers = self.tiers
        assert tiers.disk is not None
        tiers.host.unpin(write.key)
        tiers.host.write_back_again(write.key)
        tiers.disk.give_up()
        tiers.stats.failed_writes += 1
        tiers.fault(tiers.disk, tiers.disk.writing, "written", error)
