"""The host tier: which key lies in which slot of host memory, what may be evicted, what disk has still to get.

Bookkeeping alone; the bytes are behind the Transfer door. A slot is *filling* while a copy into it is under way, then
*ready*. Filling and pinned slots are never evicted.
"""

from __future__ import annotations

from collections import OrderedDict

from jserve.cache.eviction import EvictionOrder


class HostTier:
    """`num_slots` blocks of host memory."""

    def __init__(self, num_slots: int, eviction: str = "lru") -> None:
        self.num_slots = num_slots
        self.evictions = 0
        self._order = EvictionOrder(eviction)
        self._slot_of: dict[bytes, int] = {}
        self._parent_of: dict[bytes, bytes | None] = {}
        self._filling: set[bytes] = set()
        self._write_back: OrderedDict[bytes, None] = OrderedDict()
        self._blank = list(range(num_slots - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, key: bytes) -> bool:
        """Whether the block is here, or on its way."""
        return key in self._slot_of

    def is_ready(self, key: bytes) -> bool:
        return key in self._slot_of and key not in self._filling

    def slot(self, key: bytes) -> int:
        return self._slot_of[key]

    def parent(self, key: bytes) -> bytes | None:
        """The block before it in its chain, if known."""
        return self._parent_of[key]

    def reserve(self, key: bytes, parent: bytes | None) -> int | None:
        """A slot to fill with a new block, evicting another if needed; None if every one is pinned or filling."""
        if self._blank:
            slot = self._blank.pop()
        else:
            victim = self._order.pop_victim()
            if victim is None:
                return None
            self.evictions += 1
            slot = self._forget(victim)
        self._slot_of[key], self._parent_of[key] = slot, parent
        self._filling.add(key)
        self._order.insert(key, parent)
        self._order.pin(key)
        return slot

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
        del self._parent_of[key]
        return self._slot_of.pop(key)

    def pin(self, key: bytes) -> None:
        self._order.pin(key)

    def unpin(self, key: bytes) -> None:
        self._order.unpin(key)

    def is_pinned(self, key: bytes) -> bool:
        return self._order.is_pinned(key)

    def use(self, chain: list[bytes]) -> None:
        """A chain of blocks was used, head first."""
        self._order.touch_chain([key for key in chain if key in self._slot_of])

    @property
    def looks_ahead(self) -> bool:
        return self._order.strategy == "lookahead"

    def set_lookahead(self, keys: list[bytes]) -> None:
        """The blocks that waiting requests need, in queue order, for eviction by look-ahead."""
        self._order.set_lookahead(keys)

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
