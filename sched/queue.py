"""The queue: who waits, who is first, and who is first of those that need no more than so many blocks.

Scanning ten thousand requests for the next one that fits would take longer than a step. So the queue keeps a heap of
ranks for each possible need in blocks, and over these a tournament tree: its leaf `n` is the first of those that need
`n` blocks, and every inner node the first of its two children. The first that fits into `room` blocks is then the
first of the O(log blocks) nodes that cover the leaves 0 to `room`, however many wait.

What it is told of needs may be old; the scheduler corrects it (`set_need`). It knows nothing of caches or steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from jserve.sched.order import Rank
from jserve.sched.sequence import Sequence

_Entry = tuple[Rank, Sequence]


class WaitingQueue:
    """Waiting sequences by rank. `most_need`: the largest need there is, in blocks.

    `push`, `remove` and `set_need` cost O(log waiting + log most_need), amortised; `first_fitting` O(log most_need).
    """

    def __init__(self, most_need: int) -> None:
        self._leaves = 1 << max(most_need, 1).bit_length()
        self._tree: list[_Entry | None] = [None] * (2 * self._leaves)
        self._heaps: dict[int, list[_Entry]] = {}
        self._needs: dict[Sequence, int] = {}
        self._entries = 0

    def __len__(self) -> int:
        return len(self._needs)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._needs

    def __iter__(self) -> Iterator[Sequence]:
        """In order of rank. Costs a sort."""
        return iter(sorted(self._needs, key=lambda sequence: sequence.rank))

    def need(self, sequence: Sequence) -> int:
        """The blocks that it was last said to need."""
        return self._needs[sequence]

    def push(self, sequence: Sequence, need: int) -> None:
        if sequence in self._needs:
            raise ValueError(f"{sequence.request_id} waits already")
        self._insert(sequence, need)

    def remove(self, sequence: Sequence) -> None:
        need = self._needs.pop(sequence)
        self._settle(need)

    def set_need(self, sequence: Sequence, need: int) -> None:
        before = self._needs[sequence]
        if before != need:
            self._insert(sequence, need)
            self._settle(before)

    def first(self) -> Sequence | None:
        entry = self._tree[1]
        return None if entry is None else entry[1]

    def first_fitting(self, room: int) -> Sequence | None:
        """The first that needs at most `room` blocks."""
        if room < 0:
            return None
        tree, best = self._tree, None
        low, high = self._leaves, self._leaves + min(room + 1, self._leaves)
        while low < high:
            if low & 1:
                best = _first(best, tree[low])
                low += 1
            if high & 1:
                high -= 1
                best = _first(best, tree[high])
            low >>= 1
            high >>= 1
        return None if best is None else best[1]

    def _insert(self, sequence: Sequence, need: int) -> None:
        if self._entries > 2 * len(self._needs) + 64:
            self._compact()
        self._needs[sequence] = need
        heap = self._heaps.setdefault(need, [])
        heappush(heap, (sequence.rank, sequence))
        self._entries += 1
        if heap[0][1] is sequence:
            self._raise_up(need, heap[0])

    def _settle(self, need: int) -> None:
        """Drop from the top of a heap what does not wait there any more."""
        heap, before = self._heaps[need], self._tree[self._leaves + need]
        while heap and not self._holds(heap[0], need):
            heappop(heap)
            self._entries -= 1
        first = heap[0] if heap else None
        if not heap:
            del self._heaps[need]
        if first is not before:
            self._raise_up(need, first)

    def _holds(self, entry: _Entry, need: int) -> bool:
        """Whether it still says where its sequence waits, which may have been elsewhere, and running, in between."""
        rank, sequence = entry
        return self._needs.get(sequence) == need and sequence.rank == rank

    def _raise_up(self, need: int, entry: _Entry | None) -> None:
        tree, node = self._tree, self._leaves + need
        tree[node] = entry
        while node > 1:
            node >>= 1
            tree[node] = _first(tree[2 * node], tree[2 * node + 1])

    def _compact(self) -> None:
        """Forget the entries below the tops of the heaps that nobody has any more."""
        for need, heap in self._heaps.items():
            heap[:] = {entry[1]: entry for entry in heap if self._holds(entry, need)}.values()
            heapify(heap)
            self._raise_up(need, heap[0])
        self._entries = sum(map(len, self._heaps.values()))


def _first(a: _Entry | None, b: _Entry | None) -> _Entry | None:
    if a is None or (b is not None and b[0] < a[0]):
        return b
    return a
