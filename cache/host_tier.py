"""The host tier: which key lies in which slot of host memory, what may be evicted, what disk has still to get.

Bookkeeping alone; the bytes are behind the Transfer door. A slot is *filling* while a copy into it is under way, then
*ready*. Filling and pinned slots are never evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from jserve.cache.eviction import EvictionOrder
from jserve.cache.pause import Pause


class HostTier:
    """`num_slots` blocks of host memory."""

    name = "host"

    def __init__(self, num_slots: int, eviction: str = "lru") -> None:
        self.num_slots = num_slots
        self.evictions = 0
        self.num_borrowed = 0
        self.faults = 0
        self.reading, self.writing = Pause(), Pause()
        """Of the link to the device, one for each direction."""
        self._order = EvictionOrder(eviction)
        self._slot_of: dict[bytes, int] = {}
        self._filling: set[bytes] = set()
        self._write_back: OrderedDict[bytes, None] = OrderedDict()
        self._blank = list(range(num_slots - 1, -1, -1))
        self.on_leave: Callable[[bytes], None] = lambda key: None
        """Called with the key of each block that goes, for whatever reason."""

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, key: bytes) -> bool:
        """Whether the block is here, or on its way."""
        return key in self._slot_of

    @property
    def num_filling(self) -> int:
        return len(self._filling)

    def is_filling(self, key: bytes) -> bool:
        """Whether the block is on its way."""
        return key in self._filling

    def reach(self, chain: Sequence[bytes], most: int) -> int:
        """Of the `most` leading blocks of a chain, how many are here, or on their way (`block_keys.reach`)."""
        return self._order.reach(chain, most)

    def is_ready(self, key: bytes) -> bool:
        return key in self._slot_of and key not in self._filling

    def slot(self, key: bytes) -> int:
        return self._slot_of[key]

    def parent(self, key: bytes) -> bytes | None:
        """The block before it in its chain, if known."""
        return self._order.parent(key)

    def reserve(self, key: bytes, parent: bytes | None, due_s: float | None = None) -> int | None:
        """A slot to fill with a new block, evicting another if needed, but never its parent, without which nobody could
        find it; None if every one is pinned or filling. `due_s`: as `EvictionOrder.insert`."""
        slot = self._blank.pop() if self._blank else self._evict(keep=parent)
        if slot is None:
            return None
        self._slot_of[key] = slot
        self._filling.add(key)
        self._order.insert(key, parent, due_s, pinned=True)
        return slot

    def borrow(self) -> int | None:
        """A slot for a block that nobody shall find, until `give_back`; None if every one is pinned or filling."""
        slot = self._blank.pop() if self._blank else self._evict(keep=None)
        self.num_borrowed += slot is not None
        return slot

    def give_back(self, slot: int) -> None:
        self.num_borrowed -= 1
        self._blank.append(slot)

    def _evict(self, keep: bytes | None) -> int | None:
        """The slot of the next block to go."""
        if keep is not None and keep in self._slot_of:
            self._order.pin(keep)
            victim = self._order.pop_victim()
            self._order.unpin(keep)
        else:
            victim = self._order.pop_victim()
        if victim is None:
            return None
        self.evictions += 1
        return self._forget(victim)

    def fill(self, key: bytes, *, write_back: bool) -> None:
        """The block has come. `write_back`: disk has still to get it (FlashGen's write-back bit)."""
        self._filling.remove(key)
        self._order.unpin(key)
        if write_back:
            self._write_back[key] = None

    def drop(self, key: bytes) -> None:
        """Forget a block, whatever its state."""
        self._order.remove(key)
        self._filling.discard(key)
        self._blank.append(self._forget(key))

    def _forget(self, key: bytes) -> int:
        self._write_back.pop(key, None)
        self.on_leave(key)
        return self._slot_of.pop(key)

    def pin(self, key: bytes) -> None:
        self._order.pin(key)

    def unpin(self, key: bytes) -> None:
        self._order.unpin(key)

    def is_pinned(self, key: bytes) -> bool:
        return self._order.is_pinned(key)

    def set_now(self, now_s: float) -> None:
        """The time, for eviction by predicted return."""
        self._order.now_s = now_s

    def expect(self, key: bytes, due_s: float) -> None:
        """The block, if it is here, is predicted to be used then."""
        self._order.expect(key, due_s)

    @property
    def has_blank(self) -> bool:
        """Whether a block can come without another going."""
        return bool(self._blank)

    def victim_due_s(self) -> float | None:
        """When the next block to go is predicted to be used; None if none may go."""
        return self._order.victim_due_s()

    def use(self, chain: Sequence[bytes], count: int) -> None:
        """The first `count` blocks of a chain were used."""
        self._order.use(chain, count)

    @property
    def looks_ahead(self) -> bool:
        return self._order.strategy == "lookahead"

    def set_lookahead(self, chains: Iterable[tuple[Sequence[bytes], int]]) -> None:
        """What waiting requests need, in queue order, for eviction by look-ahead: so many leading blocks of a chain."""
        self._order.set_lookahead(chains)

    # --- the write-back bit -------------------------------------------------------------------------------------

    @property
    def write_back_backlog(self) -> int:
        return len(self._write_back)

    def next_write_back(self) -> bytes | None:
        """The block that has waited longest for disk; its bit is cleared."""
        return self._write_back.popitem(last=False)[0] if self._write_back else None

    def write_back_again(self, key: bytes) -> None:
        """Disk has not got it after all."""
        if key in self._slot_of:
            self._write_back[key] = None
