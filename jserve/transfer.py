"""The Transfer door on JAX: copies between the device pool and host memory (`host_slots`), and the disk store.

Everything here is started and polled on the engine's thread, and ends elsewhere: on the device, or on the threads of
the disk store.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import jax

from jserve.cache.transfer import Completion
from jserve.host_slots import Bytes, Copy, host_slots

if TYPE_CHECKING:
    from jserve.cache.disk_store import DiskCompletion, DiskStore
    from jserve.runner import Runner


class JaxTransfer:
    """See the module."""

    def __init__(self, runner: Runner, disk: DiskStore | None = None) -> None:
        self._runner, self._disk = runner, disk
        self._slots = host_slots(runner)
        self.in_turn = runner.copies_directly
        self._copies: dict[int, Copy] = {}
        self._disk_slots: dict[int, tuple[int, Bytes | None]] = {}  # by ticket: slot, and the buffer of a read
        self._put_off: list[tuple[int, bytes, int]] = []  # reads whose slot is not free yet
        self._deletes = 0  # their tickets are negative: nobody asks for them

    def store(self, ticket: int, blocks: list[int], host_slots: list[int]) -> None:
        with self._runner.phase("load"):
            self._copies[ticket] = self._slots.store(blocks, host_slots)

    def load(self, ticket: int, host_slots: list[int], blocks: list[int]) -> bool:
        with self._runner.phase("load"):
            self._copies[ticket], ordered = self._slots.load(host_slots, blocks)
        return ordered

    def write(self, ticket: int, host_slot: int, key: bytes) -> None:
        self._disk_slots[ticket] = host_slot, None
        self._the_disk.write(ticket, key, self._slots.source(host_slot))

    def read(self, ticket: int, key: bytes, host_slot: int) -> None:
        buffer = self._slots.buffer(host_slot)
        if buffer is None:
            self._put_off.append((ticket, key, host_slot))
            return
        self._disk_slots[ticket] = host_slot, buffer
        self._the_disk.read(ticket, key, buffer)

    def delete(self, key: bytes) -> None:
        self._deletes += 1
        self._the_disk.delete(-self._deletes, key)

    def cancel(self, ticket: int) -> None:
        copy = self._copies.pop(ticket, None)
        if copy is not None:
            copy.cancelled = True
        self._put_off = [read for read in self._put_off if read[0] != ticket]
        if ticket in self._disk_slots:
            slot, _ = self._disk_slots.pop(ticket)
            if not self._the_disk.cancel(ticket):
                self._slots.abandon(slot)

    def poll(self) -> list[Completion]:
        with self._runner.phase("load"):
            self._slots.poll()
        ended = [self._end(ticket, copy) for ticket, copy in self._copies.items() if copy.error or not copy.parts]
        for completion in ended:
            del self._copies[completion.ticket]
        put_off, self._put_off = self._put_off, []
        for ticket, key, slot in put_off:
            self.read(ticket, key, slot)
        return ended + self._poll_disk()

    def close(self) -> None:
        self._slots.close()
        self._copies.clear()
        if self._disk is not None:
            self._disk.close()

    def _end(self, ticket: int, copy: Copy) -> Completion:
        if copy.error is not None:
            return Completion(ticket, copy.error)
        exact_s = copy.exact_s
        return Completion(
            ticket,
            seconds=exact_s or time.perf_counter() - copy.start_s,
            least_s=exact_s or copy.running_s,
            num_bytes=copy.blocks * self._runner.block_bytes,
        )

    def _poll_disk(self) -> list[Completion]:
        ended = self._disk.poll() if self._disk is not None else []
        return [self._end_on_disk(end) for end in ended if end.ticket in self._disk_slots]

    def _end_on_disk(self, end: DiskCompletion) -> Completion:
        from jserve.cache.disk_store import Outcome

        slot, buffer = self._disk_slots.pop(end.ticket)
        error = None if end.outcome is Outcome.OK else end.detail or end.outcome.value
        if error is None and buffer is not None:
            try:
                self._slots.fill(slot, buffer)
            except jax.errors.JaxRuntimeError as full:
                error = str(full)
        return Completion(
            end.ticket,
            error,
            device_fault=end.outcome is Outcome.FAILED,
            corrupt=end.outcome is Outcome.CORRUPT,
            seconds=end.seconds,
            least_s=end.seconds,
            num_bytes=end.num_bytes,
        )

    @property
    def _the_disk(self) -> DiskStore:
        assert self._disk is not None, "the hierarchy has no disk tier either"
        return self._disk
