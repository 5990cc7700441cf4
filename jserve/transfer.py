"""The Transfer door on JAX: copies between the device pool, pinned host memory and the disk store.

A host slot is one array `[layers, 2, block_size, kv_heads, head_dim]` in pinned host memory, sharded like the pool. All
device work is started on the engine's thread, which owns the pool: what is copied out is first gathered into arrays of
its own, and what comes in is put beside the pool first, and into it when it has arrived, so that no step ever waits
for the link.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array

from jserve.cache.transfer import Completion

if TYPE_CHECKING:
    from jserve.cache.disk_store import DiskStore
    from jserve.runner import Runner


@dataclass(slots=True)
class _Copy:
    """Arrays under way, and what happens when they are there."""

    arrays: list[Array]
    finish: Callable[[list[Array]], None]
    start_s: float


class JaxTransfer:
    """See the module. Driven by the engine's thread alone."""

    def __init__(self, runner: Runner, disk: DiskStore | None = None) -> None:
        self._runner, self._disk = runner, disk
        self._slots: dict[int, Array] = {}
        self._copies: dict[int, _Copy] = {}
        self._failed: list[Completion] = []
        self._reads: dict[int, tuple[int, np.ndarray]] = {}  # ticket: slot, buffer
        self._deletes = 0  # their tickets are negative: nobody asks for them
        self._cancelled: dict[int, np.ndarray] = {}  # reads whose buffer the disk store may still be filling

    def store(self, ticket: int, blocks: list[int], host_slots: list[int]) -> None:
        def finish(arrays: list[Array]) -> None:
            self._slots.update(zip(host_slots, arrays, strict=True))

        self._start(ticket, lambda: jax.device_put(self._runner.gather(blocks), self._runner.host_sharding), finish)

    def load(self, ticket: int, host_slots: list[int], blocks: list[int]) -> bool:
        held = [self._slots[slot] for slot in host_slots]
        put = partial(jax.device_put, held, self._runner.block_sharding)
        self._start(ticket, put, lambda there: self._runner.scatter(blocks, there))
        return False

    def _start(self, ticket: int, put: Callable[[], list[Array]], finish: Callable[[list[Array]], None]) -> None:
        """Start a copy; if there is no memory for it, `poll` will say so."""
        start_s = time.perf_counter()
        try:
            self._copies[ticket] = _Copy(put(), finish, start_s)
        except jax.errors.JaxRuntimeError as error:
            self._failed.append(Completion(ticket, str(error)))

    def write(self, ticket: int, host_slot: int, key: bytes) -> None:
        self._the_disk.write(ticket, key, np.asarray(self._slots[host_slot]).view(np.uint8))

    def read(self, ticket: int, key: bytes, host_slot: int) -> None:
        buffer = np.empty(self._runner.block_bytes, np.uint8)
        self._reads[ticket] = host_slot, buffer
        self._the_disk.read(ticket, key, buffer)

    def delete(self, key: bytes) -> None:
        self._deletes += 1
        self._the_disk.delete(-self._deletes, key)

    def cancel(self, ticket: int) -> None:
        self._copies.pop(ticket, None)
        if ticket in self._reads:
            _, buffer = self._reads.pop(ticket)
            if not self._the_disk.cancel(ticket):
                self._cancelled[ticket] = buffer

    def poll(self) -> list[Completion]:
        ended = [ticket for ticket, copy in self._copies.items() if _there(copy.arrays)]
        failed, self._failed = self._failed, []
        return failed + [self._finish(ticket) for ticket in ended] + self._poll_disk()

    def close(self) -> None:
        self._copies.clear()
        if self._disk is not None:
            self._disk.close()

    def _finish(self, ticket: int) -> Completion:
        copy = self._copies.pop(ticket)
        try:
            copy.finish(jax.block_until_ready(copy.arrays))  # they are; an error in one of them shows here
        except jax.errors.JaxRuntimeError as error:
            return Completion(ticket, str(error))
        num_bytes = len(copy.arrays) * self._runner.block_bytes
        return Completion(ticket, seconds=time.perf_counter() - copy.start_s, num_bytes=num_bytes)

    def _poll_disk(self) -> list[Completion]:
        if self._disk is None:
            return []
        from jserve.cache.disk_store import Outcome

        completions = []
        for end in self._disk.poll():
            if end.ticket < 0 or self._cancelled.pop(end.ticket, None) is not None:
                continue
            error = None if end.outcome is Outcome.OK else end.detail or end.outcome.value
            if end.ticket in self._reads:
                slot, buffer = self._reads.pop(end.ticket)
                if error is None:
                    try:
                        self._slots[slot] = self._to_host(buffer)
                    except jax.errors.JaxRuntimeError as full:
                        error = str(full)
            completions.append(
                Completion(
                    end.ticket,
                    error,
                    device_fault=end.outcome is Outcome.FAILED,
                    corrupt=end.outcome is Outcome.CORRUPT,
                    seconds=end.seconds,
                    least_s=end.seconds,
                    num_bytes=end.num_bytes,
                )
            )
        return completions

    def _to_host(self, buffer: np.ndarray) -> Array:
        block = buffer.view(self._runner.programs.dtype).reshape(self._runner.programs.block_shape())
        placed: Array = jax.device_put(block, self._runner.host_sharding)
        return placed

    @property
    def _the_disk(self) -> DiskStore:
        assert self._disk is not None, "the hierarchy has no disk tier either"
        return self._disk


def _there(arrays: list[Any]) -> bool:
    return all(array.is_ready() for array in arrays)
