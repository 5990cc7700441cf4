"""Where disk blocks lie: what `DiskStore` asks of such a place, and the local directory.

Every call may block for as long as the device likes: only the I/O threads of `DiskStore` make them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from jserve.cache.disk_format import HEADER_BYTES, CorruptBlock, key_of

Bytes = UInt8[np.ndarray, "bytes"]

_PAGE = mmap.PAGESIZE
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux
_USED_AGAIN_S = 60.0  # a file's time of last use is kept this exactly, not to write its inode at each read
_ABANDONED_S = 600.0  # a writer's folder without a lock is younger than this while it is being set up


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block that lies there, not verified."""

    key: bytes
    num_bytes: int
    """With its header."""
    used_s: float
    """When it was last written or read, in the clock of the place (Unix time); 0 where that is not known."""


class BlockFiles(Protocol):
    """Whole blocks by name. Names are `disk_format.block_name`'s; errors OSError, with FileNotFoundError for a miss."""

    def read(self, name: str, header: Any, payload: Bytes) -> None:
        """Fill a header page and a payload. CorruptBlock if the stored length differs."""

    def write(self, name: str, header: Any, payload: Bytes) -> None:
        """Publish a block: whoever reads sees all of it, or what was there before."""

    def delete(self, name: str) -> None: ...

    def list(self) -> list[StoredBlock]:
        """Every block. Removes what interrupted writers have left."""

    def describe(self, name: str, text: str) -> None:
        """Leave a small text file beside the blocks, if it is not there yet."""

    def close(self) -> None: ...


class LocalFiles:
    """Blocks as files of one directory.

    A file is written under `writers/ID/` and renamed to its place. The writer holds a lock (flock) on its folder as
    long as it lives, so another process can tell what a dead one has left, and clear it away. Nothing is synced: after
    a power failure the checksums tell which blocks have arrived.
    """

    def __init__(self, folder: Path, block_bytes: int, *, direct: bool) -> None:
        self._folder = folder
        self._block_bytes = block_bytes
        self._device = _make_folder(folder)
        self._writer = folder / "writers"
        self._lock_fd = -1
        self._setup = threading.Lock()
        self._scratch = threading.local()
        self._enter()
        self.direct = direct and block_bytes % _PAGE == 0 and self._takes_direct()

    def read(self, name: str, header: Any, payload: Bytes) -> None:
        into = self._aligned(payload)
        fd = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC | self._flags)
        try:
            seen = os.fstat(fd)
            if seen.st_size != HEADER_BYTES + len(payload):
                raise CorruptBlock(f"the file has {seen.st_size} bytes instead of {HEADER_BYTES + len(payload)}")
            _transfer(lambda buffers, offset: os.preadv(fd, buffers, offset), header, into)
            if time.time() - seen.st_mtime > _USED_AGAIN_S:
                with suppress(OSError):  # of another user, or on a read-only mount
                    os.utime(fd)
        finally:
            os.close(fd)
        if into is not payload:
            np.copyto(payload, into)

    def write(self, name: str, header: Any, payload: Bytes) -> None:
        source = self._aligned(payload)
        if source is not payload:
            np.copyto(source, payload)
        with self._publishing(name, self._flags) as fd:
            _transfer(lambda buffers, offset: os.pwritev(fd, buffers, offset), header, source)

    def delete(self, name: str) -> None:
        os.unlink(self._folder / name)

    def list(self) -> list[StoredBlock]:
        self._clear_dead_writers()
        return [block for shard in _entries(self._folder) if shard.is_dir() for block in self._list_shard(shard)]

    def describe(self, name: str, text: str) -> None:
        if not (self._folder / name).exists():  # so that a full disk can be opened, and read
            with self._publishing(name, 0) as fd:
                os.write(fd, text.encode())

    def close(self) -> None:
        if self._lock_fd >= 0:
            shutil.rmtree(self._writer, ignore_errors=True)
            os.close(self._lock_fd)
            self._lock_fd = -1

    @property
    def _flags(self) -> int:
        return _DIRECT if self.direct else 0

    def _list_shard(self, shard: os.DirEntry[str]) -> Iterator[StoredBlock]:
        for entry in _entries(Path(shard.path)):
            key = key_of(f"{shard.name}/{entry.name}")
            if key is None:
                continue
            with suppress(OSError):  # deleted meanwhile
                seen = entry.stat(follow_symlinks=False)
                if seen.st_size == HEADER_BYTES + self._block_bytes:
                    yield StoredBlock(key, seen.st_size, seen.st_mtime)
                else:
                    os.unlink(entry.path)

    @contextmanager
    def _publishing(self, name: str, flags: int) -> Iterator[int]:
        """A file to write, which takes its name at the end. If its folders have vanished, they are made again."""
        temporary = self._writer / name.rpartition("/")[2]
        place = self._folder / name
        flags |= os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            fd = os.open(temporary, flags, 0o600)
        except FileNotFoundError:
            self._enter()
            temporary = self._writer / name.rpartition("/")[2]
            fd = os.open(temporary, flags, 0o600)
        try:
            try:
                yield fd
            finally:
                os.close(fd)
            try:
                os.rename(temporary, place)
            except FileNotFoundError:
                place.parent.mkdir(mode=0o700, exist_ok=True)
                os.rename(temporary, place)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _enter(self) -> None:
        """Make this writer's folder and lock it. It appears under its name only when it is locked."""
        with self._setup:
            if self._lock_fd >= 0:
                if self._writer.is_dir():
                    return  # another thread has just done it
                os.close(self._lock_fd)
                self._lock_fd = -1
            if _device_of(self._folder.parent) != self._device:  # unmounted: do not fill what is below
                raise OSError(f"{self._folder.parent} is no longer the file system that it was")
            self._folder.mkdir(mode=0o700, exist_ok=True)
            name = uuid.uuid4().hex
            made = self._folder / "writers" / f"{name}.new"
            made.mkdir(mode=0o700, parents=True)
            self._lock_fd = os.open(made / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._writer = made.rename(made.with_name(name))

    def _clear_dead_writers(self) -> None:
        for entry in _entries(self._folder / "writers"):
            if entry.path != str(self._writer) and _is_dead(Path(entry.path)):
                shutil.rmtree(entry.path, ignore_errors=True)

    def _takes_direct(self) -> bool:
        """Whether this file system has direct I/O: some, like older tmpfs, refuse it."""
        probe, page = self._writer / "probe", mmap.mmap(-1, _PAGE)
        try:
            fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | _DIRECT, 0o600)
            try:
                return bool(_DIRECT) and os.write(fd, page) == _PAGE
            finally:
                os.close(fd)
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)

    def _aligned(self, payload: Bytes) -> Bytes:
        """The payload itself if the device can take it as it lies, else this thread's own buffer of its size."""
        if not self.direct or payload.ctypes.data % _PAGE == 0:
            return payload
        if not hasattr(self._scratch, "buffer"):
            self._scratch.buffer = np.frombuffer(mmap.mmap(-1, self._block_bytes), np.uint8)
        buffer: Bytes = self._scratch.buffer
        return buffer


def _transfer(move: Callable[[list[Any], int], int], header: Any, payload: Bytes) -> None:
    """Move header and payload as one run of bytes; the system may take it in pieces."""
    total, done = HEADER_BYTES + len(payload), move([header, payload], 0)
    while done < total:
        if done < HEADER_BYTES:
            moved = move([memoryview(header)[done:], payload], done)
        else:
            moved = move([payload[done - HEADER_BYTES :]], done)
        if moved == 0:
            raise CorruptBlock(f"the file ends at byte {done} of {total}")
        done += moved


def _make_folder(folder: Path) -> int:
    """Make it if need be; the device of the directory that it lies in."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _device_of(folder.parent)


def _device_of(path: Path) -> int:
    try:
        return path.stat().st_dev
    except OSError:
        return -1


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_dead(writer: Path) -> bool:
    """Whether the process that owns this folder has ended: then its lock can be had."""
    try:
        fd = os.open(writer / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return _age_s(writer) > _ABANDONED_S
    try:
        if writer.suffix == ".new" and _age_s(writer) < _ABANDONED_S:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
