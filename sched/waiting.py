"""Who waits: those that could start if they fitted, in the queue, and those whose KV is still being read from disk.

`look` says whether it is worth while to look at the queue at all: whether one that waits might fit that did not before,
because something was given back, has come or has become easier to place.
"""

from __future__ import annotations

from collections.abc import Iterator

from jserve.cache.kv_cache import KVCache
from jserve.sched.queue import WaitingQueue
from jserve.sched.sequence import Sequence, rank_of

LOOKS_PER_STEP = 32
"""Waiting requests that seem to fit and do not, before a step looks no further."""


class Waiting:
    """All that wait for their start."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self.queue = WaitingQueue(cache.num_blocks)
        self._passed: dict[Sequence, None] = {}
        """Outside of the queue: their KV is being read from disk."""
        self.look = False

    def __len__(self) -> int:
        return len(self.queue) + len(self._passed)

    def __iter__(self) -> Iterator[Sequence]:
        """In order of rank. Costs a sort: `len` does not."""
        return iter(sorted([*self.queue, *self._passed], key=rank_of))

    @property
    def reading(self) -> bool:
        """Whether somebody waits for the disk."""
        return bool(self._passed)

    def need(self, sequence: Sequence) -> int:
        """Blocks that it takes to start, counted anew; it is woken when they become fewer."""
        return self._cache.need(sequence.table, sequence.tokens, sequence)

    def add(self, sequence: Sequence) -> None:
        if self._cache.is_ready(sequence.table):
            self.queue.push(sequence, self.need(sequence))
            self.look = True
        else:
            self._passed[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        """It has ended."""
        if sequence in self.queue:
            self.queue.remove(sequence)
        else:
            del self._passed[sequence]
        self.look = True  # it may have kept others waiting

    def look_again(self) -> None:
        """See who has become easier to place: blocks of its prefix are held by others now, or have come from disk."""
        woken = self._cache.index.woken
        if woken:
            for sequence in woken[:LOOKS_PER_STEP]:
                if sequence in self.queue:
                    self.queue.set_need(sequence, self.need(sequence))
                    self.look = True
            del woken[:LOOKS_PER_STEP]
        for sequence in [s for s in self._passed if self._cache.is_ready(s.table)]:
            del self._passed[sequence]
            self.add(sequence)
