"""A KV block outside the process: its name, and the header page that proves it whole.

    FOLDER/ab/ab3f…e1        one block: header page, then the payload as it lies in host memory

A block is served only if its header names this format, this fingerprint, this key and this length, and the crc32c of
header and payload agree. So a torn, truncated, flipped, misplaced or foreign block is never taken for a good one. The
header fills a page, so that the payload is aligned for direct I/O.
"""

from __future__ import annotations

import re
import struct
from hashlib import blake2b
from typing import Any

from crc32c import crc32c

from jserve.cache.block_keys import KEY_BYTES

FORMAT = 1
HEADER_BYTES = 4096
FINGERPRINT_BYTES = 16

_MAGIC = b"jserveKV"
_FIELDS = struct.Struct(f"<8sII{FINGERPRINT_BYTES}s{KEY_BYTES}sQI")
_CHECK = struct.Struct("<I")  # crc32c of the rest of the page, at its end
_NAME = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{30})")


class CorruptBlock(Exception):
    """What is stored under a key is not its block. Never shown as such: it is a miss that is counted."""


def fingerprint_digest(fingerprint: str, block_bytes: int) -> bytes:
    """What every block of one folder has in common: format, model and block size."""
    said = f"{FORMAT}\n{block_bytes}\n{fingerprint}".encode()
    return blake2b(said, digest_size=FINGERPRINT_BYTES, person=b"jserve folder").digest()


def block_name(key: bytes) -> str:
    """Where a block lies in its folder. The first byte is a folder of its own: directories stay small."""
    name = key.hex()
    return f"{name[:2]}/{name}"


def key_of(name: str) -> bytes | None:
    """The key whose name this is; None for anything else that lies in the folder."""
    found = _NAME.fullmatch(name)
    return bytes.fromhex(found[2]) if found else None


def write_header(page: Any, digest: bytes, key: bytes, payload: Any) -> None:
    """Fill a page (a writable buffer of `HEADER_BYTES`) for `payload`, a contiguous buffer of bytes."""
    view = memoryview(page)
    fields = _FIELDS.pack(_MAGIC, FORMAT, HEADER_BYTES, digest, key, len(payload), crc32c(payload))
    view[: len(fields)] = fields
    view[len(fields) :] = bytes(HEADER_BYTES - len(fields))
    _CHECK.pack_into(page, HEADER_BYTES - _CHECK.size, crc32c(view[: -_CHECK.size]))


def check_block(page: Any, digest: bytes, key: bytes, payload: Any) -> None:
    """CorruptBlock unless this header page and this payload are the block of `key`."""
    view = memoryview(page)
    magic, version, header_bytes, its_digest, its_key, length, checksum = _FIELDS.unpack_from(view)
    if magic != _MAGIC:
        raise CorruptBlock("it is not a KV block of jserve")
    if (version, header_bytes) != (FORMAT, HEADER_BYTES):
        raise CorruptBlock(f"format {version} with a header of {header_bytes} bytes")
    if _CHECK.unpack_from(view, HEADER_BYTES - _CHECK.size)[0] != crc32c(view[: -_CHECK.size]):
        raise CorruptBlock("the header's checksum is wrong")
    if its_digest != digest:
        raise CorruptBlock("it belongs to another model or block size")
    if its_key != key:
        raise CorruptBlock(f"it is the block {its_key.hex()}")
    if length != len(payload):
        raise CorruptBlock(f"it has {length} bytes instead of {len(payload)}")
    if checksum != crc32c(payload):
        raise CorruptBlock("the payload's checksum is wrong")
