"""Disk blocks behind any TensorStore URL: the remote tier.

The same bytes under the same names as `disk_files.LocalFiles`, so one reads what the other wrote, `file://` included.
A local directory is nevertheless not read through here. TensorStore's Python API hands values out as `bytes`, which
costs two more copies into fresh memory, one of them under the interpreter's lock, so that the engine's thread would
stand still for a good part of every read; and its file driver has no direct I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import tensorstore as ts

from jserve.cache.disk_files import Bytes, StoredBlock
from jserve.cache.disk_format import HEADER_BYTES, CorruptBlock, key_of


class KvFiles:
    """Blocks as values of a TensorStore key-value store: memory://, s3://, gs://, file://, ..."""

    def __init__(self, url: str, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        with _as_os_errors():
            self._kv = ts.KvStore.open(url.rstrip("/") + "/", context=_context()).result()

    def read(self, name: str, header: Any, payload: Bytes) -> None:
        with _as_os_errors():
            found = self._kv.read(name).result()
        if found.state != "value":
            raise FileNotFoundError(f"{name} is missing")
        value = np.frombuffer(found.value, np.uint8)
        if len(value) != HEADER_BYTES + len(payload):
            raise CorruptBlock(f"the value has {len(value)} bytes instead of {HEADER_BYTES + len(payload)}")
        memoryview(header)[:] = value[:HEADER_BYTES].data
        np.copyto(payload, value[HEADER_BYTES:])

    def write(self, name: str, header: Any, payload: Bytes) -> None:
        with _as_os_errors():
            self._kv.write(name, b"".join((header, payload.data))).result()

    def delete(self, name: str) -> None:
        with _as_os_errors():
            self._kv.write(name, None).result()

    def list(self) -> list[StoredBlock]:
        with _as_os_errors():
            names = self._kv.list().result()
        keys = (key_of(name.decode()) for name in names)
        return [StoredBlock(key, HEADER_BYTES + self._block_bytes, 0.0) for key in keys if key is not None]

    def describe(self, name: str, text: str) -> None:
        with _as_os_errors():
            self._kv.write(name, text.encode()).result()

    def close(self) -> None:
        pass


@cache
def _context() -> Any:
    """One for the process, so that two stores on memory:// see the same blocks, and connections are shared.

    Nothing is synced: checksums tell what has arrived. The limit is what file:// does best with.
    """
    return ts.Context({"file_io_sync": False, "file_io_concurrency": {"limit": 4}})


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """TensorStore reports what its drivers met as ValueError and the like: say it as an I/O error."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError((str(error).strip().splitlines() or [type(error).__name__])[0]) from error
