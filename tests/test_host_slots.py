"""Blocks go from the pool to host slots and back as they were, of whichever kind the slots are, and leave no memory."""

from __future__ import annotations

import dataclasses
import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jserve import checkpoints, host_slots
from jserve.cache.disk_store import DiskStore
from jserve.cache.transfer import LOADS_BESIDE_POOL, STORES_BESIDE_POOL, Completion
from jserve.config import AttentionBackend, CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.host_slots import Copy, HostSlots, PinnedSlots, SharedSlots
from jserve.pallas_kernels import native
from jserve.progress import SilentProgress
from jserve.runner import Runner, make_mesh
from jserve.transfer import JaxTransfer

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parent / "fixtures" / "models" / "llama2_gqa"
BLOCK, BLOCKS = 4, 160
KINDS: list[tuple[AttentionBackend, int]] = [("xla", 1)]
if jax.default_backend() == "cpu" and native.unavailable() is None:
    KINDS.append(("native", 1))
if jax.device_count() > 1:
    KINDS.append(("xla", 2))


def make_runner(backend: AttentionBackend, tp: int) -> Runner:
    mesh = make_mesh(tp)
    loaded = checkpoints.load(MODEL, mesh=mesh, dtype=np.float32)
    config = EngineConfig(
        tp=tp,
        cache=CacheConfig(block_size=BLOCK, device_blocks=BLOCKS, host_gib=1.0),
        sched=SchedConfig(max_running=4, token_budget=8),
        runner=RunnerConfig(attention_backend=backend, token_buckets=(8,), warmup=False),
    )
    return Runner(config, loaded.model, loaded.spec, loaded.name, mesh, SilentProgress())


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-tp{kind[1]}")
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    runner = make_runner(*request.param)
    rng = np.random.default_rng(0)
    for pools in (runner._k, runner._v):
        for i, pool in enumerate(pools):
            pools[i] = jax.device_put(rng.normal(size=pool.shape).astype(np.float32), pool.sharding)
    yield runner
    runner.close()


def contents(runner: Runner, blocks: list[int]) -> np.ndarray:
    """[blocks, layers, 2, block_size, kv_heads, head_dim]"""
    layers = [np.stack([np.asarray(k), np.asarray(v)], 1) for k, v in zip(runner._k, runner._v, strict=True)]
    return np.stack(layers, 1)[blocks]


def finish(slots: HostSlots, copy: Copy) -> None:
    deadline_s = time.monotonic() + 20
    while copy.parts and copy.error is None and time.monotonic() < deadline_s:
        slots.poll()
    assert copy.error is None
    assert copy.parts == 0


def test_the_kind_is_that_of_the_device(runner: Runner) -> None:
    assert isinstance(host_slots.host_slots(runner), SharedSlots if runner.copies_directly else PinnedSlots)


@pytest.mark.parametrize("count", [1, 5, 16, 70])
def test_blocks_come_back_as_they_were(runner: Runner, count: int) -> None:
    slots = host_slots.host_slots(runner)
    there, places, back = list(range(count)), list(range(40, 40 + count)), list(range(159, 159 - count, -1))
    before, others = contents(runner, there), contents(runner, list(range(count, 160 - count)))
    finish(slots, slots.store(there, places))
    copy, _ = slots.load(places, back)
    finish(slots, copy)
    np.testing.assert_array_equal(contents(runner, back), before)
    np.testing.assert_array_equal(contents(runner, list(range(count, 160 - count))), others)
    slots.close()


def test_a_slot_is_written_to_disk_and_read_from_it_as_one_block(runner: Runner) -> None:
    slots = host_slots.host_slots(runner)
    finish(slots, slots.store([3], [7]))
    source = slots.source(7)
    np.testing.assert_array_equal(source.view(np.float32), contents(runner, [3]).ravel())
    buffer = slots.buffer(8)
    assert buffer is not None
    buffer[:] = source
    slots.fill(8, buffer)
    copy, _ = slots.load([8], [9])
    finish(slots, copy)
    np.testing.assert_array_equal(contents(runner, [9]), contents(runner, [3]))
    slots.close()


def test_what_was_written_to_disk_keeps_no_second_copy(runner: Runner) -> None:
    slots = host_slots.host_slots(runner)
    if not isinstance(slots, PinnedSlots):
        pytest.skip("a slot is its own source")
    finish(slots, slots.store([0], [0]))
    source = slots.source(0)
    assert slots._slots[0]._npy_value is None  # type: ignore[attr-defined]
    gone = weakref.ref(source)
    del source
    gc.collect()
    assert gone() is None


def test_a_slot_that_is_given_up_gives_its_memory_back(runner: Runner) -> None:
    slots = host_slots.host_slots(runner)
    if not isinstance(slots, PinnedSlots):
        pytest.skip("slots share one arena, which is as large as the tier")
    finish(slots, slots.store([0, 1, 2], [0, 1, 2]))
    gone, others = weakref.ref(slots._slots[1]), slots._slots[2]
    finish(slots, slots.store([5], [1]))
    gc.collect()
    assert gone() is None
    assert not others.is_deleted()


def test_a_load_takes_no_more_memory_beside_the_pool_than_is_kept_for_it(runner: Runner) -> None:
    slots = host_slots.host_slots(runner)
    if not isinstance(slots, PinnedSlots):
        pytest.skip("nothing lies beside the pool")
    places = list(range(BLOCKS // 2))
    finish(slots, slots.store(places, places))
    copies = [slots.load(places, places)[0] for _ in range(3)]
    while any(copy.parts for copy in copies):
        assert sum(len(blocks) for _, blocks, _ in slots._arriving) <= LOADS_BESIDE_POOL
        slots.poll()
    assert not slots._arriving
    assert not slots._loads


def test_a_small_load_comes_before_the_next_step_and_a_large_one_in_parts(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not runner.copies_directly:
        pytest.skip("the link has no turn among the steps")
    monkeypatch.setattr(host_slots, "LOAD_AT_ONCE_BYTES", 10 * runner.block_bytes)
    slots = SharedSlots(runner)
    finish(slots, slots.store(list(range(25)), list(range(25))))
    small, at_once = slots.load([0, 1], [100, 101])
    assert at_once
    large, at_once = slots.load(list(range(25)), list(range(110, 135)))
    assert not at_once
    assert len(slots._loads) == 2
    slots.load([2], [102])  # has its turn behind the large one
    assert len(slots._loads) == 3
    finish(slots, small)
    finish(slots, large)
    slots.poll()
    np.testing.assert_array_equal(contents(runner, [*range(110, 135), 102]), contents(runner, [*range(25), 2]))
    slots.close()


def test_a_cancelled_load_starts_no_further_part(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_slots, "LOAD_AT_ONCE_BYTES", 10 * runner.block_bytes)
    slots = host_slots.host_slots(runner)
    places = list(range(70))
    finish(slots, slots.store(places, places))
    target = list(range(80, 150))
    before = contents(runner, target)
    copy, _ = slots.load(places, target)
    copy.cancelled = True
    for _ in range(50):
        slots.poll()
    runner.wait()
    if runner.copies_directly:
        assert (contents(runner, target[10:]) == before[10:]).all()
    else:
        assert (contents(runner, target) == before).all()
    slots.close()


class LateDisk:
    """A disk store that ends what the test tells it to."""

    def __init__(self) -> None:
        self.started: dict[int, np.ndarray] = {}

    def read(self, ticket: int, key: bytes, into: np.ndarray) -> None:
        self.started[ticket] = into

    def write(self, ticket: int, key: bytes, source: np.ndarray) -> None:
        self.started[ticket] = source

    def cancel(self, ticket: int) -> bool:
        return False

    def poll(self) -> list[Completion]:
        return []

    def close(self) -> None:
        pass


def test_the_disk_does_not_read_into_a_slot_that_is_being_loaded_from(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not runner.copies_directly:
        pytest.skip("a read has a buffer of its own")
    disk = LateDisk()
    transfer = JaxTransfer(runner, disk)  # type: ignore[arg-type]
    transfer.store(1, [0], [5])
    assert [end.ticket for end in ended(transfer, 1)] == [1]
    with monkeypatch.context() as patch:
        patch.setattr(host_slots, "_is_there", lambda array: False)
        transfer.load(2, [5], [9])
        transfer.read(3, b"key", 5)
        transfer.poll()
        assert not disk.started
    assert [end.ticket for end in ended(transfer, 1)] == [2]
    transfer.poll()
    assert list(disk.started) == [3]
    transfer.close()


def test_a_slot_that_a_cancelled_copy_may_still_write_to_is_not_read_into(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not runner.copies_directly:
        pytest.skip("a read has a buffer of its own")
    disk = LateDisk()
    transfer = JaxTransfer(runner, disk)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(host_slots, "_is_there", lambda array: False)
        transfer.store(1, [0], [5])
        transfer.cancel(1)
        transfer.read(2, b"key", 5)
        transfer.poll()
        assert not disk.started
    deadline_s = time.monotonic() + 20
    while not disk.started and time.monotonic() < deadline_s:
        assert not transfer.poll()
    assert list(disk.started) == [2]
    transfer.close()


@pytest.mark.parametrize("doing", ["read", "write"])
def test_a_disk_that_hangs_keeps_the_memory_and_not_the_slot(runner: Runner, doing: str) -> None:
    disk = LateDisk()
    transfer = JaxTransfer(runner, disk)  # type: ignore[arg-type]
    transfer.store(1, [0], [5])
    ended(transfer, 1)
    if doing == "read":
        transfer.read(2, b"key", 5)
    else:
        transfer.write(2, 5, b"key")
    memory = disk.started[2]
    before = memory.copy()
    transfer.cancel(2)
    if doing == "write":  # the host has its block all the same
        np.testing.assert_array_equal(transfer._slots.source(5).view(np.float32), contents(runner, [0]).ravel())
    transfer.store(3, [1], [5])
    ended(transfer, 1)
    np.testing.assert_array_equal(memory, before)
    np.testing.assert_array_equal(transfer._slots.source(5).view(np.float32), contents(runner, [1]).ravel())
    transfer.close()


def ended(transfer: JaxTransfer, count: int) -> list[Completion]:
    found: list[Completion] = []
    deadline_s = time.monotonic() + 20
    while len(found) < count and time.monotonic() < deadline_s:
        found += transfer.poll()
    assert all(end.error is None and end.least_s <= end.seconds for end in found)
    return found


def test_a_real_disk_fills_the_slots(runner: Runner, tmp_path: Path) -> None:
    disk = DiskStore.open(tmp_path, "fingerprint", runner.block_bytes)
    transfer = JaxTransfer(runner, disk)
    transfer.store(1, [0, 1], [0, 1])
    ended(transfer, 1)
    transfer.write(2, 0, b"0" * 16)
    transfer.write(3, 1, b"1" * 16)
    ended(transfer, 2)
    transfer.read(4, b"0" * 16, 6)
    transfer.read(5, b"1" * 16, 7)
    assert {end.num_bytes for end in ended(transfer, 2)} == {disk.stored_bytes}
    transfer.load(6, [6, 7], [20, 21])
    ended(transfer, 1)
    np.testing.assert_array_equal(contents(runner, [20, 21]), contents(runner, [0, 1]))
    transfer.close()


def test_copies_on_their_way_have_memory_of_their_own_beside_the_pool(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocks(host_gib: float) -> int:
        cache = CacheConfig(block_size=BLOCK, host_gib=host_gib)
        monkeypatch.setattr(runner, "config", dataclasses.replace(runner.config, cache=cache))
        return runner._size(4096, "gpu").num_blocks

    monkeypatch.setattr(runner, "_free_bytes", lambda *_: 1000 * runner.block_bytes // runner.config.tp)
    assert blocks(0.0) - blocks(1.0) == STORES_BESIDE_POOL + LOADS_BESIDE_POOL
