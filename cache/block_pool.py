"""The blocks of the device pool: who holds each, and which may be taken.

A block is *held* (reference count above zero), *reclaimable* (held by nobody, but its KV can still be found) or
*blank*. Reclaimable blocks count as free: taking one is a metadata operation.

They are taken in the order in which the requests that held them completed, and those of one request from its tail on:
FlashGen's FIFO of completed KV (§3.2). A block that a later request finds leaves that order, and joins it again at the
end when that request completes. So here first in, first out and least recently used are one order, and there is nothing
to choose. Below the device they differ, since blocks stay in their tier while they are used: LRU, FIFO, look-ahead and
what else there is are strategies of one contract there (`eviction`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from jserve.cache.prefix_index import PrefixIndex


class BlockPool:
    """Reference counts over `num_blocks` blocks; owns none of their contents."""

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        self.num_blocks = num_blocks
        self._index = index
        self._refs = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._reclaimable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._blank) + len(self._reclaimable)

    @property
    def num_reclaimable(self) -> int:
        return len(self._reclaimable)

    def ref_count(self, block: int) -> int:
        return self._refs[block]

    def is_reclaimable(self, block: int) -> bool:
        return block in self._reclaimable

    def allocate(self, count: int) -> list[int] | None:
        """Exactly `count` blocks, held once each and forgotten by the index; or None, and nothing has changed."""
        if count > self.num_free:
            return None
        blanks = max(0, len(self._blank) - count)
        blocks = self._blank[blanks:]
        blocks.reverse()
        del self._blank[blanks:]
        while len(blocks) < count:
            block, _ = self._reclaimable.popitem(last=False)
            self._index.forget(block)
            blocks.append(block)
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """One more reference on each of these blocks, which the index has just found."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._reclaimable[block]
                self._index.hold(block)
            self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less on each; those that nobody holds any more become reclaimable, in this order."""
        for block in blocks:
            left = self._refs[block] - 1
            if left < 0:
                raise ValueError(f"block {block} is released, but nobody holds it")
            self._refs[block] = left
            if not left:
                if self._index.has_block(block):
                    self._reclaimable[block] = None
                else:
                    self._blank.append(block)

    def blank(self, blocks: Iterable[int]) -> None:
        """Forget the KV of those that nobody holds: they are as if never used."""
        for block in blocks:
            if block in self._reclaimable:
                del self._reclaimable[block]
                self._index.forget(block)
                self._blank.append(block)
