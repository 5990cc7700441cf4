"""The disk tier's I/O: KV blocks by key, in a local directory or behind any TensorStore URL.

`DiskStore` decides nothing: which blocks to write, read and evict is the hierarchy's choice. It starts what it is told
on threads of its own and tells how it ended through `poll`; no call waits for a device. Checksums are made and checked
on those threads as well, outside the interpreter's lock. A block that is not whole, or not the one asked for, is
deleted and reported as corrupt: for the caller a miss.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from jserve.cache.disk_files import BlockFiles, Bytes, LocalFiles, StoredBlock
from jserve.cache.disk_format import (
    FORMAT,
    HEADER_BYTES,
    CorruptBlock,
    block_name,
    check_block,
    fingerprint_digest,
    write_header,
)
from jserve.errors import ConfigError

_ABOUT = "about.json"
_FOLDER = re.compile(r"kv-[0-9a-f]{32}")


class Operation(Enum):
    READ = "read"
    WRITE = "write"
    DELETE = "delete"


class Outcome(Enum):
    OK = "ok"
    MISSING = "missing"
    """Nothing is stored under the key (any more)."""
    CORRUPT = "corrupt"
    """What was stored there was not the block. It has been deleted; the buffer's contents mean nothing."""
    FAILED = "failed"
    """The device or the system refused: full, unreadable, gone, or the store was closed first."""


@dataclass(frozen=True, slots=True)
class DiskCompletion:
    """The end of one operation. `ticket` is the caller's own name for it."""

    ticket: int
    operation: Operation
    outcome: Outcome
    detail: str
    """What went wrong, for a log; empty if nothing did."""
    seconds: float
    """Of the operation itself, without its time in the queue."""
    num_bytes: int
    """Moved, header included; 0 unless the outcome is OK."""


@dataclass(slots=True)
class _Job:
    ticket: int
    operation: Operation
    key: bytes
    payload: Bytes | None = None
    started: bool = False


class DiskStore:
    """Blocks of `block_bytes` each, of one model (`fingerprint`).

    Until an operation has completed its buffer is the store's: for a read that nobody waits for any longer, too.
    Operations on different keys end in any order. Writes and deletes of one key are done in the order given; a read
    is ordered against neither, and is either whole or a miss.
    """

    def __init__(
        self,
        files: BlockFiles,
        digest: bytes,
        block_bytes: int,
        *,
        read_threads: int = 4,
        write_threads: int = 4,
        on_completion: Callable[[], None] | None = None,
    ) -> None:
        self.files = files
        self.block_bytes = block_bytes
        self.stored_bytes = HEADER_BYTES + block_bytes
        """What one block takes of the tier's capacity."""
        self._digest = digest
        self._wake = on_completion or (lambda: None)
        self._jobs: dict[int, _Job] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._done: deque[DiskCompletion] = deque()
        self._reads: SimpleQueue[_Job | None] = SimpleQueue()
        self._writes: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in range(write_threads)]
        queues = [self._reads] * read_threads + self._writes
        self._threads = [
            threading.Thread(target=self._work, args=(queue,), name=f"disk-{i}", daemon=True)
            for i, queue in enumerate(queues)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def open(
        cls,
        location: str | Path,
        fingerprint: str,
        block_bytes: int,
        *,
        read_threads: int = 4,
        write_threads: int = 4,
        direct: bool = True,
        on_completion: Callable[[], None] | None = None,
    ) -> DiskStore:
        """The store for one model under a directory or a TensorStore URL (`scheme://...`).

        Models of other fingerprints, or with blocks of another size, have folders of their own beside it, which
        stay as they are. `direct`: bypass the page cache where the file system can, for host memory is a cache
        already; URLs have no such choice. `on_completion` is called on an I/O thread after each operation, to wake a
        sleeping engine. ConfigError if blocks cannot be written there.
        """
        digest = fingerprint_digest(fingerprint, block_bytes)
        folder = f"kv-{digest.hex()}"
        files: BlockFiles | None = None
        try:
            if "://" in str(location):
                from jserve.cache.disk_kv import KvFiles  # TensorStore takes a while to import

                files = KvFiles(f"{str(location).rstrip('/')}/{folder}", block_bytes)
            else:
                files = LocalFiles(Path(location).absolute() / folder, block_bytes, direct=direct)
            about = {"format": FORMAT, "fingerprint": fingerprint, "block_bytes": block_bytes}
            files.describe(_ABOUT, json.dumps(about, indent=1) + "\n")
        except OSError as error:
            if files is not None:
                files.close()
            raise ConfigError(
                f"KV blocks cannot be kept in {location}: {_text(error)}. Name a directory that this user can write "
                "to and that has space, or a URL that TensorStore can write to; or serve without a disk tier"
            ) from None
        return cls(
            files,
            digest,
            block_bytes,
            read_threads=read_threads,
            write_threads=write_threads,
            on_completion=on_completion,
        )

    def index(self) -> list[StoredBlock]:
        """What is stored, longest unused first. Waits for the device: for start-up only."""
        try:
            return sorted(self.files.list(), key=lambda block: (block.used_s, block.key))
        except OSError as error:
            raise ConfigError(f"the stored KV blocks cannot be listed: {_text(error)}. Check the device, or name "
                              "another directory") from None  # fmt: skip

    @property
    def num_pending(self) -> int:
        """Operations that have not completed."""
        return len(self._jobs)

    def read(self, ticket: int, key: bytes, into: Any) -> None:
        """Start reading a block into a contiguous, writable buffer or array of `block_bytes`."""
        self._submit(_Job(ticket, Operation.READ, key, self._payload(into, writable=True)), self._reads)

    def write(self, ticket: int, key: bytes, source: Any) -> None:
        """Start writing a block from a contiguous buffer or array of `block_bytes`, which must not change meanwhile."""
        self._submit(_Job(ticket, Operation.WRITE, key, self._payload(source, writable=False)), self._writer_of(key))

    def delete(self, ticket: int, key: bytes) -> None:
        """Start deleting a block."""
        self._submit(_Job(ticket, Operation.DELETE, key), self._writer_of(key))

    def cancel(self, ticket: int) -> bool:
        """Take back an operation that has not started: its buffer is free at once, and no completion comes."""
        with self._changed:
            job = self._jobs.get(ticket)
            if job is None or job.started:
                return False
            self._forget(job)
            return True

    def poll(self) -> list[DiskCompletion]:
        """What has ended since the last call, with whatever outcome. Never waits, never raises."""
        ended = []
        while self._done:
            ended.append(self._done.popleft())
        return ended

    def close(self, timeout_s: float = 5.0) -> int:
        """Drop waiting reads, let writes and deletes end for `timeout_s` at most, and stop.

        Returns how many operations were cut short. Those that a device holds up for ever stay on their (daemon)
        threads, with their buffers: free no memory that they use. `poll` still tells what has ended.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            self._drop_waiting(lambda job: job.operation is Operation.READ)
            self._changed.wait_for(lambda: not self._jobs, timeout_s)
            cut_short = len(self._jobs)
            self._drop_waiting(lambda job: True)
        for queue in [self._reads] * (len(self._threads) - len(self._writes)) + self._writes:
            queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()) if cut_short else None)
        if not cut_short:
            self.files.close()
        return cut_short

    def _payload(self, buffer: Any, *, writable: bool) -> Bytes:
        array = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, np.uint8)
        if array.nbytes != self.block_bytes or not array.flags.c_contiguous or (writable and not array.flags.writeable):
            raise ValueError(f"a block's buffer is {self.block_bytes} contiguous bytes, writable for a read; this has "
                             f"{array.nbytes}, {array.flags.c_contiguous=}, {array.flags.writeable=}")  # fmt: skip
        return array.reshape(-1).view(np.uint8)

    def _writer_of(self, key: bytes) -> SimpleQueue[_Job | None]:
        return self._writes[key[-1] % len(self._writes)]

    def _submit(self, job: _Job, queue: SimpleQueue[_Job | None]) -> None:
        with self._changed:
            if job.ticket in self._jobs:
                raise ValueError(f"ticket {job.ticket} is in use")
            if self._closed:
                self._done.append(DiskCompletion(job.ticket, job.operation, Outcome.FAILED, "closed", 0.0, 0))
                return
            self._jobs[job.ticket] = job
        queue.put(job)

    def _work(self, queue: SimpleQueue[_Job | None]) -> None:
        header = mmap.mmap(-1, HEADER_BYTES)  # aligned, for direct I/O
        while (job := queue.get()) is not None:
            with self._changed:
                if self._jobs.get(job.ticket) is not job:
                    continue  # cancelled
                job.started = True
            started_s = time.perf_counter()
            outcome, detail = self._attempt(job, header)
            seconds = time.perf_counter() - started_s
            moved = self.stored_bytes if outcome is Outcome.OK and job.payload is not None else 0
            self._end(job, DiskCompletion(job.ticket, job.operation, outcome, detail, seconds, moved))

    def _attempt(self, job: _Job, header: mmap.mmap) -> tuple[Outcome, str]:
        """Do it. Whatever goes wrong becomes an outcome: nothing may kill an I/O thread."""
        name = block_name(job.key)
        try:
            if job.payload is None:
                self.files.delete(name)
            elif job.operation is Operation.WRITE:
                write_header(header, self._digest, job.key, job.payload)
                self.files.write(name, header, job.payload)
            else:
                self.files.read(name, header, job.payload)
                check_block(header, self._digest, job.key, job.payload)
        except CorruptBlock as error:
            with suppress(Exception):
                self.files.delete(name)
            return Outcome.CORRUPT, f"{name}: {error}"
        except FileNotFoundError as error:
            missing = job.operation is not Operation.WRITE
            return (Outcome.MISSING if missing else Outcome.FAILED), f"{name}: {_text(error)}"
        except Exception as error:
            return Outcome.FAILED, f"{name}: {_text(error)}"
        return Outcome.OK, ""

    def _end(self, job: _Job, completion: DiskCompletion) -> None:
        with self._changed:
            self._done.append(completion)
            self._forget(job)
        self._wake()

    def _forget(self, job: _Job) -> None:
        del self._jobs[job.ticket]
        if not self._jobs:
            self._changed.notify_all()

    def _drop_waiting(self, which: Callable[[_Job], bool]) -> None:
        for job in [job for job in self._jobs.values() if not job.started and which(job)]:
            self._done.append(DiskCompletion(job.ticket, job.operation, Outcome.FAILED, "closed", 0.0, 0))
            self._forget(job)


def _text(error: Exception) -> str:
    """An error in one line, without the file names that the caller gives itself."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One model's folder in a disk directory."""

    folder: Path
    fingerprint: str
    block_bytes: int
    num_blocks: int
    num_bytes: int


def stored_models(directory: Path) -> list[StoredModel]:
    """Whose blocks lie in a local disk directory. Folders of models that are no longer served only take space."""
    found = []
    for folder in sorted(directory.iterdir() if directory.is_dir() else []):
        if _FOLDER.fullmatch(folder.name):
            with suppress(OSError, ValueError, KeyError, TypeError):
                about = json.loads((folder / _ABOUT).read_text("utf-8"))
                sizes = [
                    entry.stat().st_size for shard in folder.glob("[0-9a-f][0-9a-f]") for entry in os.scandir(shard)
                ]
                found.append(
                    StoredModel(folder, str(about["fingerprint"]), int(about["block_bytes"]), len(sizes), sum(sizes))
                )
    return found


def remove_model(model: StoredModel) -> None:
    """Delete a model's blocks. A server that uses them goes on without: it misses, and computes again."""
    shutil.rmtree(model.folder, ignore_errors=True)
