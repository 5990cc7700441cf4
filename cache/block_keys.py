"""Names of KV blocks: 128-bit hashes chained over everything that a block's KV depends on.

The KV of a block is a function of the model, the adapter and every token up to the block's end, so its key is a
hash of its parent's key and its own tokens. Two blocks with one key hold the same KV: keys are the only identity
that the cache trusts, so they are cryptographic (BLAKE2b) and wide enough never to collide.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Container, Sequence
from hashlib import blake2b

KEY_BYTES = 16


def root_key(fingerprint: str, cache_salt: str = "", adapter: str = "") -> bytes:
    """The parent of a first block: what the KV depends on besides the tokens. The salt parts tenants."""
    h = blake2b(digest_size=KEY_BYTES)
    for part in (fingerprint, cache_salt, adapter):
        encoded = part.encode()
        h.update(len(encoded).to_bytes(8, "little") + encoded)
    return h.digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of a full block whose tokens are `token_ids`, after the block `parent`."""
    return _hash(parent, array("i", token_ids).tobytes())


def extend_keys(keys: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int) -> None:
    """Append to `keys` (one a block) those of the further blocks that `token_ids` fills."""
    known, full = len(keys), len(token_ids) // block_size
    if known >= full:
        return
    words = array("i", token_ids[known * block_size : full * block_size])
    data, width = words.tobytes(), block_size * words.itemsize
    parent = keys[-1] if keys else root
    for start in range(0, len(data), width):
        parent = _hash(parent, data[start : start + width])
        keys.append(parent)


def reach(keys: Sequence[bytes], held: Container[bytes], most: int) -> int:
    """How many of the `most` leading blocks of a chain are held, where no block is held without those before it.

    By bisection, so that a long history costs no more than a short one. After a fault a chain may have a hole; the
    reach may then go past it, and whoever uses the blocks one by one finds it.
    """
    return bisect_left(keys, True, 0, most, key=lambda key: key not in held)


def _hash(parent: bytes, words: bytes) -> bytes:
    return blake2b(words, digest_size=KEY_BYTES, key=parent).digest()
