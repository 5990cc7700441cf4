"""Host memory for KV blocks, slot by slot, and the copies between it and the device pool. Two kinds of it:

- `SharedSlots`, where the device is the CPU: its memory is host memory, so blocks are copied straight between the pool
  and the slots, each once, by programs that take their turn among the steps.
- `PinnedSlots`, elsewhere: a slot is one array in pinned host memory, sharded like the pool, so that giving a slot up
  gives its memory back. What is copied out is first gathered into arrays of its own, and what comes in is put beside
  the pool first, and into it when it has arrived, so that no step ever waits for the link.

All of it runs on the engine's thread, which owns the pool.
"""

from __future__ import annotations

import mmap
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import jax
import numpy as np
from jax import Array
from jaxtyping import UInt8

from jserve.batch import COPY_BUCKETS, DIRECT_COPY_BLOCKS
from jserve.cache.transfer import LOAD_AT_ONCE_BYTES, LOADS_BESIDE_POOL, STORES_BESIDE_POOL

if TYPE_CHECKING:
    from jserve.runner import Runner

Bytes = UInt8[np.ndarray, "bytes"]
T = TypeVar("T")

_SLAB_BYTES = 32 << 20
_PAGE = mmap.PAGESIZE


@dataclass(slots=True, eq=False)
class Copy:
    """Some blocks on their way."""

    blocks: int
    parts: int
    """Still to end."""
    start_s: float = field(default_factory=time.perf_counter)
    running_s: float = 0.0
    """How long it has run for certain."""
    exact_s: float = 0.0
    """What its parts have taken, where they tell."""
    error: str | None = None
    cancelled: bool = False


class HostSlots(Protocol):
    """See the module. A copy has ended when it has no parts left, or an error."""

    def store(self, blocks: list[int], slots: list[int]) -> Copy:
        """Start copying blocks of the pool, as the steps launched so far leave them."""

    def load(self, slots: list[int], blocks: list[int]) -> tuple[Copy, bool]:
        """Start copying into the pool; and whether the steps launched from now on may read the blocks already."""

    def poll(self) -> None:
        """Note what has ended, and start what can start."""

    def source(self, slot: int) -> Bytes:
        """What the slot holds, to be written to disk."""

    def buffer(self, slot: int) -> Bytes | None:
        """Where to put what the slot shall hold; None as long as an earlier copy may still read it."""

    def fill(self, slot: int, buffer: Bytes) -> None:
        """The slot shall hold what has been put into the buffer."""

    def abandon(self, slot: int) -> None:
        """Somebody may use the slot's source or buffer for ever: it is theirs; the slot keeps its block elsewhere."""

    def close(self) -> None:
        """Wait until nothing is under way."""


def host_slots(runner: Runner) -> HostSlots:
    """The kind that suits the runner's device."""
    return SharedSlots(runner) if runner.copies_directly else PinnedSlots(runner)


def parts_of(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _is_there(array: Any) -> bool:
    return bool(array.is_ready())


# --- where the device's memory is the host's


class SharedSlots:
    """Slots in slabs of page-aligned memory, which is taken from the system as it is used first.

    XLA knows nothing of this memory. So whoever reads or writes it must have ended before it is used otherwise: copies
    have their turn among themselves, the disk waits for them, and the memory outlives the last.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._stride = -(-runner.block_bytes // _PAGE) * _PAGE
        self._memory: dict[int, Bytes] = {}
        self._address: dict[int, int] = {}
        self._in_copy: dict[int, Array] = {}  # slots that are copied from or to, with what tells of the last one's end
        self._copies: dict[Copy, list[Array]] = {}
        self._loads: deque[tuple[Copy, Sequence[int], Sequence[int]]] = deque()  # parts that are not started
        self._at_once = max(1, min(LOAD_AT_ONCE_BYTES // runner.block_bytes, DIRECT_COPY_BLOCKS))
        weakref.finalize(self, _wait_for, self._copies, self._memory)

    def store(self, blocks: list[int], slots: list[int]) -> Copy:
        copy = Copy(len(blocks), 0)
        for part, to in zip(*(parts_of(x, DIRECT_COPY_BLOCKS) for x in (blocks, slots)), strict=True):
            ended = self._runner.copy_out(part, self._addresses(to))
            self._started(copy, ended)
            self._in_copy.update(dict.fromkeys(to, ended))
        return copy

    def load(self, slots: list[int], blocks: list[int]) -> tuple[Copy, bool]:
        copy = Copy(len(blocks), 0)
        parts = deque(zip(*(parts_of(x, self._at_once) for x in (slots, blocks)), strict=True))
        if not self._loads:
            self._load(copy, *parts.popleft())
        copy.parts += len(parts)
        self._loads.extend((copy, *part) for part in parts)
        return copy, not parts

    def _load(self, copy: Copy, slots: Sequence[int], blocks: Sequence[int]) -> None:
        ended = self._runner.copy_in(blocks, self._addresses(slots))
        self._started(copy, ended)
        self._in_copy.update(dict.fromkeys(slots, ended))

    def _started(self, copy: Copy, ended: Array) -> None:
        copy.parts += 1
        self._copies.setdefault(copy, []).append(ended)

    def poll(self) -> None:
        while self._loads and self._loads[0][0].cancelled:
            self._loads.popleft()
        if self._loads:
            copy, slots, blocks = self._loads.popleft()
            copy.parts -= 1
            self._load(copy, slots, blocks)
        for copy, running in list(self._copies.items()):
            for ended in filter(_is_there, list(running)):
                running.remove(ended)
                copy.parts -= 1
                copy.exact_s += float(ended)
            if not running:
                del self._copies[copy]

    def source(self, slot: int) -> Bytes:
        return self._at(slot)

    def buffer(self, slot: int) -> Bytes | None:
        ended = self._in_copy.pop(slot, None)
        if ended is not None and not _is_there(ended):
            self._in_copy[slot] = ended
            return None
        return self._at(slot)

    def fill(self, slot: int, buffer: Bytes) -> None:
        assert self._memory[slot] is buffer, "the disk reads straight into the slot"

    def abandon(self, slot: int) -> None:
        memory = next(self._slab(1))
        memory[:] = self._at(slot)  # what is written to disk stays here too
        self._give(slot, memory)

    def close(self) -> None:
        _wait_for(self._copies, self._memory)

    def _addresses(self, slots: Sequence[int]) -> list[int]:
        for slot in slots:
            if slot not in self._memory:
                self._grow(slot)
        return [self._address[slot] for slot in slots]

    def _at(self, slot: int) -> Bytes:
        if slot not in self._memory:
            self._grow(slot)
        return self._memory[slot]

    def _grow(self, slot: int) -> None:
        """Memory for this slot and those after it."""
        count = max(1, _SLAB_BYTES // self._stride)
        for i, memory in zip(range(slot, slot + count), self._slab(count), strict=True):
            if i not in self._memory:
                self._give(i, memory)

    def _give(self, slot: int, memory: Bytes) -> None:
        self._memory[slot], self._address[slot] = memory, memory.ctypes.data

    def _slab(self, count: int) -> Iterator[Bytes]:
        pages = mmap.mmap(-1, count * self._stride)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, len(pages), self._stride):
            yield np.frombuffer(pages, np.uint8, self._runner.block_bytes, start)


def _wait_for(copies: dict[Copy, list[Array]], memory: dict[int, Bytes]) -> None:
    """Nobody writes to this memory, or reads it, from now on."""
    jax.block_until_ready(list(copies.values()))
    copies.clear()
    memory.clear()


# --- elsewhere


class PinnedSlots:
    """Slots as arrays of `[layers, 2, block_size, kv_heads, head_dim]` in pinned host memory."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._slots: dict[int, Array] = {}
        self._stores: list[tuple[Copy, Sequence[int], list[Array]]] = []
        self._loads: deque[tuple[Copy, Sequence[int], Sequence[Array]]] = deque()  # batches that are not started
        self._arriving: list[tuple[Copy, Sequence[int], list[Array]]] = []

    def store(self, blocks: list[int], slots: list[int]) -> Copy:
        copy = Copy(len(blocks), 0)
        for part, to in zip(*(parts_of(x, COPY_BUCKETS[-1]) for x in (blocks, slots)), strict=True):
            self._make_room()
            try:
                arrays = jax.device_put(self._runner.gather(list(part)), self._runner.host_sharding)
            except jax.errors.JaxRuntimeError as error:  # there is no memory for it
                copy.error = str(error)
                break
            copy.parts += 1
            self._stores.append((copy, to, arrays))
        return copy

    def _make_room(self) -> None:
        """Gathered blocks lie beside the pool until they have left. Where a whole sequence goes at once that was never
        written through, it waits here for the link."""
        room = STORES_BESIDE_POOL - COPY_BUCKETS[-1]
        leaving = [(len(to), arrays) for _, to, arrays in self._stores if not all(map(_is_there, arrays))]
        while sum(count for count, _ in leaving) > room:
            _, arrays = leaving.pop(0)
            jax.block_until_ready(arrays)

    def load(self, slots: list[int], blocks: list[int]) -> tuple[Copy, bool]:
        copy = Copy(len(blocks), 0)
        held = [self._slots[slot] for slot in slots]
        for part, arrays in zip(*(parts_of(x, COPY_BUCKETS[-1]) for x in (blocks, held)), strict=True):
            copy.parts += 1
            self._loads.append((copy, part, arrays))
        self._start_loads()
        return copy, False

    def _start_loads(self) -> None:
        room = LOADS_BESIDE_POOL - COPY_BUCKETS[-1]
        while self._loads and sum(len(blocks) for _, blocks, _ in self._arriving) <= room:
            copy, blocks, arrays = self._loads.popleft()
            if copy.cancelled or copy.error is not None:
                continue
            try:
                self._arriving.append((copy, blocks, jax.device_put(arrays, self._runner.block_sharding)))
            except jax.errors.JaxRuntimeError as error:
                copy.error = str(error)

    def poll(self) -> None:
        for copy, slots, arrays in self._ended(self._stores):
            self._slots.update(zip(slots, arrays, strict=True))
            copy.parts -= 1
        for copy, blocks, arrays in self._ended(self._arriving):
            self._runner.scatter(list(blocks), arrays)
            copy.parts -= 1
        self._start_loads()

    def _ended(self, copies: list[tuple[Copy, Any, list[Array]]]) -> Iterator[tuple[Copy, Any, list[Array]]]:
        """Those whose arrays are there, which leave the list."""
        for entry in list(copies):
            copy, _, arrays = entry
            if not all(map(_is_there, arrays)):
                copy.running_s = time.perf_counter() - copy.start_s
                continue
            copies.remove(entry)
            try:
                jax.block_until_ready(arrays)  # they are, but an error in one of them shows here
            except jax.errors.JaxRuntimeError as error:
                copy.error = str(error)
            if copy.error is None and not copy.cancelled:
                yield entry

    def source(self, slot: int) -> Bytes:
        array = self._slots[slot]
        # By another array over the same memory: NumPy's copy stays with the array that it was made from.
        shards = [shard.data for shard in array.addressable_shards]
        passing = jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
        return np.ascontiguousarray(np.asarray(passing)).reshape(-1).view(np.uint8)

    def buffer(self, slot: int) -> Bytes | None:
        return np.empty(self._runner.block_bytes, np.uint8)

    def fill(self, slot: int, buffer: Bytes) -> None:
        block = buffer.view(self._runner.programs.dtype).reshape(self._runner.programs.block_shape())
        self._slots[slot] = jax.device_put(block, self._runner.host_sharding)

    def abandon(self, slot: int) -> None:
        """Nothing to do: sources and buffers have memory of their own."""

    def close(self) -> None:
        self._stores.clear()
        self._loads.clear()
        self._arriving.clear()
