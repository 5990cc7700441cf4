"""Which block of the device pool holds which key. Owns the mapping alone; whether a block is in use is the pool's.

A waiting sequence needs fewer blocks once another one holds the next block of its prefix. So that nobody has to look
again and again, it can watch that block's key: `woken` gathers those whose key has come into use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jserve.cache.block_keys import reach


class PrefixIndex:
    """A one-to-one map between keys and blocks."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._watchers: dict[bytes, dict[Any, None]] = {}
        self.woken: list[Any] = []

    def __len__(self) -> int:
        return len(self._block_of)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of known keys, from the first on."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def reach(self, chain: Sequence[bytes], most: int) -> int:
        """Of the `most` leading blocks of a chain, how many are here (`block_keys.reach`)."""
        return reach(chain, self._block_of, most)

    def block_of(self, key: bytes) -> int | None:
        """The block that holds this key."""
        return self._block_of.get(key)

    def publish(self, key: bytes, block: int) -> bool:
        """Make `block` findable; False, and no change, if another block already holds this KV."""
        if key in self._block_of:
            return False
        if block in self._key_of:
            raise ValueError(f"block {block} is already published under another key")
        self._block_of[key] = block
        self._key_of[block] = key
        if self._watchers:
            self._wake(key)
        return True

    def watch(self, key: bytes, who: Any) -> None:
        """Put `who` into `woken` when a sequence comes to hold the block of this key, the next time."""
        self._watchers.setdefault(key, {})[who] = None

    def unwatch(self, key: bytes, who: Any) -> None:
        watchers = self._watchers.get(key)
        if watchers is not None:
            watchers.pop(who, None)
            if not watchers:
                del self._watchers[key]

    def hold(self, block: int) -> None:
        """A block that nobody held is held again."""
        if self._watchers and (key := self._key_of.get(block)) is not None:
            self._wake(key)

    def _wake(self, key: bytes) -> None:
        self.woken += self._watchers.pop(key, ())

    def has_block(self, block: int) -> bool:
        return block in self._key_of

    def forget(self, block: int) -> None:
        """Drop what is known of `block`, whose KV is about to be overwritten."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
