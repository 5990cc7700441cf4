"""Names of KV blocks: 128-bit hashes chained over everything that a block's KV depends on.

The KV of a block is a function of the model, the adapter and every token up to the block's end, so its key is a
hash of its parent's key and its own tokens. Two blocks with one key hold the same KV: keys are the only identity
that the cache trusts, so they are cryptographic (BLAKE2b) and wide enough never to collide.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
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
    return blake2b(array("i", token_ids).tobytes(), digest_size=KEY_BYTES, key=parent).digest()


def extend_keys(keys: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int) -> None:
    """Append to `keys` (one a block) those of the further blocks that `token_ids` fills."""
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        keys.append(block_key(keys[-1] if keys else root, token_ids[start : start + block_size]))
