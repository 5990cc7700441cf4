"""Which block of a full tier goes first: LRU, FIFO (FlashGen §3.2), look-ahead (CachedAttention) or predicted return.

One contract, `EvictionOrder`, and one comparable rank a strategy: the smallest rank is the next victim; of `returns`,
whose rank is a time, the smallest or the largest, whichever is farther from now. Two rules stand above every rank. A
pinned block is never a victim. A block that has children in the tier is never a victim either: without their parent
its children could not be found, so a chain goes from its tail to its head.

So what is said of a block, that it is pinned, was used or is needed, holds for all before it as well, and a chain of
any length is kept or touched by its last block alone. When a block goes, its parent takes its recency, its place in
the queue and its predicted time over.

Pure bookkeeping over keys: it owns no block and no byte, and reads no clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence

import msgspec

from jserve.cache.block_keys import reach
from jserve.errors import ConfigError

Rank = tuple[float, float]
_Place = tuple[float, float, bytes]
"""In a heap: a rank, flat, for these are compared all the time; and whose it is."""


class Entry(msgspec.Struct, gc=False):
    """What a rank may depend on. `inserted` and `used` are readings of one counter, which never repeats."""

    parent: bytes | None
    inserted: int
    used: int
    due_s: float
    """When it is predicted to be used next; where nothing is predicted, when it was used last."""
    pins: int = 0
    position: int | None = None
    """Place of the first waiting request whose need ends with this block, or with one after it that has gone; None if
    there is none."""
    rank: Rank | None = None
    """Under which it is in the heap; None if it is not there, as a block that may not go need not be."""


def lru(entry: Entry) -> Rank:
    """Least recently used first."""
    return (0, entry.used)


def fifo(entry: Entry) -> Rank:
    """Oldest first, however often it was used: FlashGen's order."""
    return (0, entry.inserted)


def look_ahead(entry: Entry) -> Rank:
    """What no waiting request needs goes first, least recently used; then what is needed latest (CachedAttention)."""
    return (0, entry.used) if entry.position is None else (1, -entry.position)


def by_return(entry: Entry) -> Rank:
    """What is predicted to be used farthest from now goes first, be it late in coming or overdue (`returns.Returns`;
    Bidaw, FAST'26). Where nothing is predicted, this is LRU."""
    return (entry.due_s, entry.used)


STRATEGIES: dict[str, Callable[[Entry], Rank]] = {
    "lru": lru,
    "fifo": fifo,
    "lookahead": look_ahead,
    "returns": by_return,
}


class EvictionOrder:
    """The blocks of one tier in the order in which they may go.

    Every call costs O(log n) at most, amortised; `set_lookahead` that for each chain that it names or named.
    """

    def __init__(self, strategy: str = "lru") -> None:
        if strategy not in STRATEGIES:
            raise ConfigError(f"there is no eviction strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
        self.strategy = strategy
        self._rank = STRATEGIES[strategy]
        self._entries: dict[bytes, Entry] = {}
        self._children: dict[bytes, int] = {}  # of any parent, in the tier or not: it may come (back) after them
        self._heap: list[_Place] = []  # with stale ranks, which are dropped when they surface
        self._far: list[_Place] = []  # the same with negative ranks, where those are times
        self._positions: dict[bytes, int] = {}
        self._clock = 0
        self.now_s = 0.0
        """Set by whoever knows the time."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def inserted(self, key: bytes) -> int:
        """When the block came into the tier, in a count that never repeats."""
        return self._entries[key].inserted

    def parent(self, key: bytes) -> bytes | None:
        """The block before it in its chain, if known."""
        return self._entries[key].parent

    def is_pinned(self, key: bytes) -> bool:
        return self._entries[key].pins > 0

    def insert(
        self, key: bytes, parent: bytes | None = None, due_s: float | None = None, *, pinned: bool = False
    ) -> None:
        """A block has come into the tier. `parent`: the block before it in its chain, if known. `due_s`: when it is
        predicted to be used, if anything is."""
        if key in self._entries:
            raise ValueError(f"block {key.hex()} is in this tier already")
        now = self._tick()
        entry = self._entries[key] = Entry(None, now, now, self.now_s if due_s is None else due_s, int(pinned))
        if parent is not None:
            self._adopt(entry, parent)
        if not pinned:
            self._offer(key, entry)

    def touch(self, key: bytes) -> None:
        """The block was used."""
        entry = self._entries[key]
        entry.used, entry.due_s = self._tick(), self.now_s
        self._offer(key, entry)

    def expect(self, key: bytes, due_s: float) -> None:
        """The block, if it is here, is predicted to be used then."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.due_s = due_s
            self._offer(key, entry)

    def use(self, chain: Sequence[bytes], count: int) -> None:
        """The first `count` blocks of a chain were used."""
        if count and chain[count - 1] in self._entries:
            self.touch(chain[count - 1])

    def learn(self, key: bytes, parent: bytes | None) -> None:
        """The parent of a block that came without one, as what an earlier process has left."""
        entry = self._entries.get(key)
        if entry is not None and entry.parent is None and parent is not None:
            self._adopt(entry, parent)

    def pin(self, key: bytes) -> None:
        """Keep the block until as many `unpin`."""
        self._entries[key].pins += 1

    def unpin(self, key: bytes) -> None:
        entry = self._entries[key]
        if entry.pins == 0:
            raise ValueError(f"block {key.hex()} is unpinned, but nobody has pinned it")
        entry.pins -= 1
        self._offer(key, entry)

    def remove(self, key: bytes) -> None:
        """The block has left the tier, pinned or not, with children or without."""
        entry = self._entries.pop(key)
        self._bequeath(key, entry)
        self._disown(entry)

    def pop_victim(self) -> bytes | None:
        """Take out the next block to go; None, and no change, if none may."""
        key = self._next_victim()
        if key is not None:
            self.remove(key)
        return key

    def victim_due_s(self) -> float | None:
        """When the next block to go is predicted to be used; None if none may go."""
        key = self._next_victim()
        return None if key is None else self._entries[key].due_s

    def _next_victim(self) -> bytes | None:
        first = self._top(self._heap, 1)
        if first is None or self._rank is not by_return:
            return first
        last = self._top(self._far, -1)
        assert last is not None, "it holds what the other heap does"
        overdue_s, ahead_s = self.now_s - self._entries[first].due_s, self._entries[last].due_s - self.now_s
        return first if overdue_s >= ahead_s else last

    def _top(self, heap: list[_Place], sign: int) -> bytes | None:
        """The block whose rank, times `sign`, is first in a heap, of those that may go."""
        while heap:
            a, b, key = heap[0]
            entry = self._entries.get(key)
            if entry is not None and entry.rank == (sign * a, sign * b):
                if self._may_go(key, entry):
                    return key
                entry.rank = None
            heapq.heappop(heap)
        return None

    def reach(self, chain: Sequence[bytes], most: int) -> int:
        """Of the `most` leading blocks of a chain, how many are here (`block_keys.reach`)."""
        return reach(chain, self._entries, most)

    def set_lookahead(self, chains: Iterable[tuple[Sequence[bytes], int]]) -> None:
        """What waiting requests need, in queue order: so many leading blocks of a chain. It replaces what was said
        before, and holds for the blocks that are here now."""
        before, self._positions = self._positions, {}
        for chain, count in chains:
            here = self.reach(chain, count)
            if here:
                self._positions.setdefault(chain[here - 1], len(self._positions))
        for key in before.keys() | self._positions.keys():
            entry = self._entries.get(key)
            if entry is not None:
                entry.position = self._positions.get(key)
                self._offer(key, entry)

    def _bequeath(self, key: bytes, entry: Entry) -> None:
        """The parent was used when its child was, and is needed where its child is."""
        parent = self._entries.get(entry.parent) if entry.parent is not None else None
        place = self._positions.pop(key, None)
        if parent is None or entry.parent is None:
            return
        parent.used = max(parent.used, entry.used)
        parent.due_s = max(parent.due_s, entry.due_s)
        if place is not None:
            parent.position = place if parent.position is None else min(parent.position, place)
            self._positions[entry.parent] = parent.position

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _adopt(self, entry: Entry, parent: bytes) -> None:
        entry.parent = parent
        self._children[parent] = self._children.get(parent, 0) + 1

    def _disown(self, entry: Entry) -> None:
        if entry.parent is None:
            return
        left = self._children[entry.parent] - 1
        if left:
            self._children[entry.parent] = left
            return
        del self._children[entry.parent]
        parent = self._entries.get(entry.parent)
        if parent is not None:
            self._offer(entry.parent, parent)

    def _may_go(self, key: bytes, entry: Entry) -> bool:
        return not entry.pins and key not in self._children

    def _offer(self, key: bytes, entry: Entry) -> None:
        """Put the block where its rank is now, if it may go. One that may not is taken out of the order only when it
        comes up (`_top`): most are pinned, and have children, for but a while."""
        if not self._may_go(key, entry):
            return
        rank = self._rank(entry)
        if rank == entry.rank:
            return
        entry.rank = rank
        a, b = rank
        heapq.heappush(self._heap, (a, b, key))
        if self._rank is by_return:
            heapq.heappush(self._far, (-a, -b, key))
        if max(len(self._heap), len(self._far)) > 2 * len(self._entries) + 64:
            self._drop_stale()

    def _drop_stale(self) -> None:
        for key, entry in self._entries.items():
            if not self._may_go(key, entry):
                entry.rank = None
        self._heap = [(*e.rank, k) for k, e in self._entries.items() if e.rank is not None]
        heapq.heapify(self._heap)
        if self._rank is by_return:
            self._far = [(-a, -b, k) for a, b, k in self._heap]
            heapq.heapify(self._far)
