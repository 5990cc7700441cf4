"""Which block of the device pool holds which key. Owns the mapping alone; whether a block is in use is the pool's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jserve.cache.block_keys import reach


class PrefixIndex:
    """A one-to-one map between keys and blocks."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

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
        return True

    def has_block(self, block: int) -> bool:
        return block in self._key_of

    def forget(self, block: int) -> None:
        """Drop what is known of `block`, whose KV is about to be overwritten."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
