"""The disk tier: which keys are on disk, what may go, and whether the disk can be trusted at the moment.

Bookkeeping alone; the files are behind the Transfer door. After a fault of the disk itself it is not read, or not
written, for a while (`pause`), and requests compute instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jserve.cache.eviction import EvictionOrder
from jserve.cache.pause import Pause


class DiskTier:
    """Up to `num_blocks` blocks on disk."""

    name = "disk"

    def __init__(self, num_blocks: int, eviction: str = "lru", present: Iterable[bytes] = ()) -> None:
        """`present`: what an earlier process has left, least recently used first."""
        self.num_blocks = num_blocks
        self.evictions = 0
        self.faults = 0
        self._order = EvictionOrder(eviction)
        self._writing = 0
        self.reading, self.writing = Pause(), Pause()
        for key in present:
            self._order.insert(key)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: bytes) -> bool:
        return key in self._order

    def reserve(self) -> list[bytes] | None:
        """Room for one more block, until `add` or `give_up`: the blocks to delete for it, which are forgotten.

        None, and no room, if there is nothing to delete.
        """
        victims = []
        while len(self._order) + self._writing >= self.num_blocks:
            victim = self._order.pop_victim()
            if victim is None:
                return None
            self.evictions += 1
            victims.append(victim)
        self._writing += 1
        return victims

    def add(self, key: bytes, parent: bytes | None, due_s: float | None = None) -> None:
        """A block has been written. `due_s`: as `EvictionOrder.insert`."""
        self._writing -= 1
        if key not in self._order:
            self._order.insert(key, parent, due_s)

    def set_now(self, now_s: float) -> None:
        """As `HostTier.set_now`."""
        self._order.now_s = now_s

    def expect(self, key: bytes, due_s: float) -> None:
        """As `HostTier.expect`."""
        self._order.expect(key, due_s)

    def give_up(self) -> None:
        """A block could not be written."""
        self._writing -= 1

    def learn(self, key: bytes, parent: bytes | None) -> None:
        """What an earlier process has left comes without the order of its chains; this is one link."""
        self._order.learn(key, parent)

    def version(self, key: bytes) -> int | None:
        """A number that tells this copy of the block from earlier and later ones; None if there is none."""
        return self._order.inserted(key) if key in self._order else None

    def drop(self, key: bytes, version: int | None) -> None:
        """This copy of the block is not there, or not good. A later copy stays."""
        if version is not None and self.version(key) == version:
            self._order.remove(key)

    def reach(self, chain: Sequence[bytes], most: int) -> int:
        """Of the `most` leading blocks of a chain, how many are here (`block_keys.reach`)."""
        return self._order.reach(chain, most)

    def use(self, chain: Sequence[bytes], count: int) -> None:
        """As `HostTier.use`."""
        self._order.use(chain, count)

    def set_lookahead(self, chains: Iterable[tuple[Sequence[bytes], int]]) -> None:
        """As `HostTier.set_lookahead`."""
        self._order.set_lookahead(chains)
