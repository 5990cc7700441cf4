"""Reading ahead: what sleeping conversations will need of the disk is on the host before they ask for it.

Of the conversations that the host has lost blocks of, the one that is predicted to return soonest is read, block by
block from where the host's part ends, if what the host would evict for it returns later by a margin (`returns`). So
what was just evicted is not read again at once, and a conversation moves once on its way from far to near.

Only what nobody else wants is used: nothing is read ahead while a request has reads to start or waits for room to read
into, and what is under way then is so little that a request which comes waits `seconds` for it, or one block's time.
A block that is read ahead is pinned by nobody and takes no room of the staging region. A request that needs it finds it
on its way to the host, like one that was read for another request.
"""

from __future__ import annotations

from collections.abc import Sequence

from jserve.cache.restore import Read
from jserve.cache.returns import Sleep
from jserve.cache.staging import READS_IN_FLIGHT, StagingRegion
from jserve.cache.tiers import Tiers

MARGIN, MARGIN_ERRORS = 2.0, 1.0
"""The victim's return is farther away than the other's by this factor, and by so many mean errors of the predictions: a
read for nothing costs as much as the one that it was to spare."""


class ReadAhead:
    """See the module. `seconds`: of reading that may be under way; 0 for none. It also tells the tiers, whether or not
    it reads, when conversations are predicted to return."""

    def __init__(self, tiers: Tiers, staging: StagingRegion, seconds: float) -> None:
        self.tiers, self.staging, self.seconds = tiers, staging, seconds
        self.margin, self.margin_errors = MARGIN, MARGIN_ERRORS
        self._read_for: dict[bytes, Sleep] = {}
        """Of blocks on the host, or on their way there."""
        tiers.host.on_leave = self._left

    def ended(self, keys: Sequence[bytes], num_tokens: int, answer_tokens: int) -> None:
        """A request has ended, and its conversation may go on after these full blocks."""
        if not keys:
            return
        sleep = self.tiers.returns.sleep(keys, num_tokens, answer_tokens, self.tiers.now_s)
        self.tiers.host.expect(sleep.leaf, sleep.due_s)
        if self.tiers.disk is not None:
            self.tiers.disk.expect(sleep.leaf, sleep.due_s)

    def arrived(self, keys: Sequence[bytes], num_tokens: int, reaches: set[int]) -> None:
        """A request has come, of so many tokens; `reaches`: how many leading blocks of its prompt each tier has."""
        for reach in reaches:
            sleep = self.tiers.returns.wake(keys[reach - 1], num_tokens, self.tiers.now_s) if reach else None
            if sleep is not None:
                self.tiers.stats.read_ahead_hits += sleep.read_ahead

    def step(self) -> None:
        """Start as many reads as may be under way."""
        tiers = self.tiers
        if not self.seconds or not tiers.disk_is_read or self.staging.unread or self.staging.deferred:
            return
        most = max(1, min(READS_IN_FLIGHT, int(self.seconds / tiers.cost.stage_s(1))))
        for _ in range(most - self.staging.reading):
            if not self._read_next():
                return

    def _read_next(self) -> bool:
        """Start the next read; False if none is worth it."""
        tiers, host = self.tiers, self.tiers.host
        assert tiers.disk is not None
        while (sleep := tiers.returns.soonest_away(tiers.now_s)) is not None:
            if not self._is_worth(sleep):
                return False
            i = host.reach(sleep.keys, len(sleep.keys))
            if i < len(sleep.keys) and sleep.keys[i] in tiers.disk:
                return self._read(sleep, i)
            tiers.returns.is_back(sleep)
        return False

    def _is_worth(self, sleep: Sleep) -> bool:
        if self.tiers.host.has_blank:
            return True
        now_s, victim_due_s = self.tiers.now_s, self.tiers.host.victim_due_s()
        if victim_due_s is None:
            return False
        least_s = self.margin * sleep.distance_s(now_s) + self.margin_errors * self.tiers.returns.model.error_s
        return abs(victim_due_s - now_s) > least_s

    def _read(self, sleep: Sleep, i: int) -> bool:
        tiers, key, parent = self.tiers, sleep.keys[i], sleep.keys[i - 1] if i else None
        assert tiers.disk is not None
        slot = tiers.host.reserve(key, parent, sleep.due_s)
        if slot is None:
            return False
        tiers.disk.learn(key, parent)
        tiers.stats.read_ahead_blocks += 1
        sleep.read_ahead += 1
        self._read_for[key] = sleep
        tiers.transfer.read(tiers.ticket(Read(key, tiers.disk.version(key), None, tiers.now_s)), key, slot)
        return True

    def _left(self, key: bytes) -> None:
        """The host has lost a block."""
        self.tiers.returns.leaves(key)
        sleep = self._read_for.pop(key, None)
        if sleep is not None and sleep.keys:
            sleep.read_ahead -= 1
            self.tiers.stats.read_ahead_wasted += 1
