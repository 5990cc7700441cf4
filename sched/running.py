"""Who holds blocks and a slot: loading, prefilling or decoding, each of them in order of rank.

Ranks decide who yields to whom: those behind a rank may have to, those ahead never. This module keeps the lists and
the slots. It decides nothing, and knows nothing of caches.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from itertools import accumulate

from jserve.sched.order import Rank
from jserve.sched.sequence import Phase, Sequence, rank_of
from jserve.sched.victim import Holder, Victim

SPARE_TOKENS = 32
"""Who has room for fewer tokens than this will soon take another block, which is spared for it."""


class Running:
    """At most `slots` sequences, on blocks of `block_size` tokens."""

    def __init__(self, slots: int, block_size: int) -> None:
        self._block_size = block_size
        self.holders: list[Sequence] = []
        """All of them."""
        self.prefills: list[Sequence] = []
        self.decodes: list[Sequence] = []
        """Those with another token to compute: the last one may still be in flight when none is left."""
        self.num_loading = 0
        self.free_slots = list(range(slots - 1, -1, -1))

    def __len__(self) -> int:
        """Those in the batch."""
        return len(self.holders) - self.num_loading

    def in_phase(self, phase: Phase) -> list[Sequence]:
        return [sequence for sequence in self.holders if sequence.phase is phase]

    # --- how one comes and goes

    def enter(self, sequence: Sequence) -> None:
        """It has got its blocks, and gets a slot; whether it has to load comes next."""
        sequence.slot = self.free_slots.pop()
        insort(self.holders, sequence, key=rank_of)

    def load(self, sequence: Sequence) -> None:
        """It waits, outside of the batch, for KV that is on its way to the device."""
        _discard(self.prefills, sequence)
        sequence.phase = Phase.LOADING
        self.num_loading += 1

    def prefill(self, sequence: Sequence) -> None:
        """From now on it is part of the batch."""
        self.num_loading -= sequence.phase is Phase.LOADING
        sequence.phase = Phase.RUNNING
        insort(self.prefills, sequence, key=rank_of)

    def decode(self, sequence: Sequence) -> None:
        """Its last chunk is planned."""
        _discard(self.prefills, sequence)
        insort(self.decodes, sequence, key=rank_of)

    def leave(self, sequence: Sequence) -> None:
        """Give the slot back. Safe with steps in flight: the device runs them before any that reuses it."""
        for group in (self.holders, self.prefills, self.decodes):
            _discard(group, sequence)
        self.num_loading -= sequence.phase is Phase.LOADING
        sequence.num_computed = sequence.news_limit = 0
        self.free_slots.append(sequence.slot)
        sequence.slot = -1

    def move(self, sequence: Sequence, rank: Rank) -> None:
        """Give it another rank."""
        groups = [group for group in (self.holders, self.prefills, self.decodes) if _discard(group, sequence)]
        sequence.rank = rank
        for group in groups:
            insort(group, sequence, key=rank_of)

    # --- who yields to whom

    def ahead(self, rank: Rank) -> int:
        """Holders of blocks that rank before it, or have it."""
        return bisect_right(self.holders, rank, key=rank_of)

    def behind(self, rank: Rank, victim: Victim) -> list[Sequence]:
        """Who yields to this rank, in the order in which they have to."""
        behind = self.holders[self.ahead(rank) :]
        keys = {s: victim(Holder(s.rank, len(s.table.blocks), s.num_computed)) for s in behind}
        return sorted(behind, key=lambda sequence: keys[sequence], reverse=True)

    def spare(self, ahead: int) -> int:
        """Blocks that the first `ahead` holders will soon take: whoever starts leaves them, or would yield at once."""
        if self._block_size <= SPARE_TOKENS:
            return ahead
        return sum(map(self._takes_soon, self.holders[:ahead]))

    def _takes_soon(self, sequence: Sequence) -> bool:
        return len(sequence.table.blocks) * self._block_size < sequence.num_tokens + SPARE_TOKENS

    def rooms(self, ahead: int, free: int) -> list[int]:
        """For those with so many holders of blocks ahead, one more, and so on: the blocks that they could have at most.

        That is the `free` ones and all of those behind, whose slots they can have too, but what is spared; or -1.
        """
        behind = self.holders[ahead:]
        blocks = [*accumulate((len(sequence.table.blocks) for sequence in reversed(behind)), initial=0)]
        if self._block_size <= SPARE_TOKENS:
            spares: Iterable[int] = range(ahead, ahead + len(blocks))
        else:
            spares = accumulate(map(self._takes_soon, behind), initial=self.spare(ahead))
        rooms = [free + theirs - spare for spare, theirs in zip(spares, reversed(blocks), strict=True)]
        if not self.free_slots:
            rooms[-1] = -1
        return rooms


def _discard(group: list[Sequence], sequence: Sequence) -> bool:
    """Take it out of a list in order of rank; False if it is not there."""
    at = bisect_left(group, sequence.rank, key=rank_of)
    if at < len(group) and group[at] is sequence:
        del group[at]
        return True
    return False
