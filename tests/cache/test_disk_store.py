"""Blocks come back from disk as they were, or not at all: after restarts, kills, faults and corruption."""

from __future__ import annotations

import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_writer import block

from jserve.cache.disk_format import HEADER_BYTES, block_name
from jserve.cache.disk_store import (
    DiskCompletion,
    DiskStore,
    Operation,
    Outcome,
    remove_model,
    stored_models,
)
from jserve.errors import ConfigError

SIZE = 2 * mmap.PAGESIZE
WRITER = Path(__file__).with_name("disk_writer.py")

Opener = Callable[..., DiskStore]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens stores and closes them at the end."""
    stores: list[DiskStore] = []

    def open_(location: str | Path, fingerprint: str = "model", size: int = SIZE, **options: Any) -> DiskStore:
        stores.append(DiskStore.open(location, fingerprint, size, **options))
        return stores[-1]

    yield open_
    for store in stores:
        store.close(timeout_s=1.0)


def finish(store: DiskStore, count: int, within_s: float = 30.0) -> dict[int, DiskCompletion]:
    """The next `count` completions by ticket."""
    ended: dict[int, DiskCompletion] = {}
    deadline = time.monotonic() + within_s
    while len(ended) < count:
        assert time.monotonic() < deadline, f"only {len(ended)} of {count} operations ended"
        ended |= {completion.ticket: completion for completion in store.poll()}
        time.sleep(0.0005)
    return ended


def wait_until(true: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def write(store: DiskStore, key: bytes, contents: bytes) -> DiskCompletion:
    store.write(1, key, contents)
    return finish(store, 1)[1]


def read(store: DiskStore, key: bytes) -> tuple[DiskCompletion, bytes]:
    into = bytearray(store.block_bytes)
    store.read(1, key, into)
    return finish(store, 1)[1], bytes(into)


def path_of(store: DiskStore, key: bytes) -> Path:
    return Path(store.files._folder) / block_name(key)  # type: ignore[attr-defined]


KEY, CONTENTS = block(0, 0, SIZE)
KEY2, CONTENTS2 = block(0, 1, SIZE)


@pytest.fixture(params=["direct", "buffered", "file URL", "memory URL"])
def store(request: pytest.FixtureRequest, tmp_path: Path, opened: Opener) -> DiskStore:
    if request.param == "file URL":
        return opened(f"file://{tmp_path}")
    if request.param == "memory URL":
        return opened(f"memory://{tmp_path}")
    return opened(tmp_path, direct=request.param == "direct")


def test_a_block_comes_back_as_it_was(store: DiskStore) -> None:
    written = write(store, KEY, CONTENTS)
    assert (written.operation, written.outcome, written.num_bytes) == (Operation.WRITE, Outcome.OK, SIZE + HEADER_BYTES)
    completion, contents = read(store, KEY)
    assert (completion.operation, completion.outcome, contents) == (Operation.READ, Outcome.OK, CONTENTS)
    assert completion.seconds > 0


def test_aligned_and_unaligned_arrays_of_any_type_are_read_and_written(store: DiskStore) -> None:
    page = np.frombuffer(mmap.mmap(-1, SIZE + mmap.PAGESIZE), np.uint8)
    for offset in (0, 64):
        source = page[offset : offset + SIZE].view(np.float32).reshape(2, 2, -1)
        source[...] = np.arange(source.size, dtype=np.float32).reshape(source.shape) + offset
        store.write(7, KEY, source)
        into = np.zeros_like(source)
        assert finish(store, 1)[7].outcome is Outcome.OK
        store.read(8, KEY, into)
        assert finish(store, 1)[8].outcome is Outcome.OK
        np.testing.assert_array_equal(into, source)


def test_what_is_not_there_is_missing_and_a_deleted_block_is_not_there(store: DiskStore) -> None:
    assert read(store, KEY)[0].outcome is Outcome.MISSING
    write(store, KEY, CONTENTS)
    store.delete(2, KEY)
    assert finish(store, 1)[2].operation is Operation.DELETE
    assert read(store, KEY)[0].outcome is Outcome.MISSING
    assert store.index() == []


def test_many_operations_at_once_all_end_with_their_own_block(store: DiskStore) -> None:
    blocks = [block(1, i, SIZE) for i in range(200)]
    for i, (key, contents) in enumerate(blocks):
        store.write(i, key, contents)
    assert {c.outcome for c in finish(store, 200).values()} == {Outcome.OK}
    buffers = [bytearray(SIZE) for _ in blocks]
    for i, (key, _) in enumerate(blocks):
        store.read(1000 + i, key, buffers[i])
    assert {c.outcome for c in finish(store, 200).values()} == {Outcome.OK}
    assert buffers == [contents for _, contents in blocks]
    assert store.num_pending == 0


def test_writes_and_deletes_of_one_key_are_done_in_order(store: DiskStore) -> None:
    for ticket in range(0, 100, 2):
        store.write(ticket, KEY, CONTENTS)
        store.delete(ticket + 1, KEY)
    store.write(100, KEY, CONTENTS)
    assert {c.outcome for c in finish(store, 101).values()} == {Outcome.OK}
    assert read(store, KEY)[1] == CONTENTS


def test_a_restart_is_warm(tmp_path: Path, opened: Opener) -> None:
    for location in (tmp_path / "made" / "for it", f"memory://{tmp_path}"):
        before = opened(location)
        write(before, KEY, CONTENTS)
        before.close()
        after = opened(location)
        assert [(found.key, found.num_bytes) for found in after.index()] == [(KEY, after.stored_bytes)]
        assert read(after, KEY)[1] == CONTENTS


def test_a_directory_and_its_file_url_are_the_same_store(tmp_path: Path, opened: Opener) -> None:
    by_path, by_url = opened(tmp_path), opened(f"file://{tmp_path}")
    write(by_path, KEY, CONTENTS)
    write(by_url, KEY2, CONTENTS2)
    assert read(by_url, KEY)[1] == CONTENTS
    assert read(by_path, KEY2)[1] == CONTENTS2
    assert len(by_path.index()) == len(by_url.index()) == 2


def test_the_index_tells_the_longest_unused_first(tmp_path: Path, opened: Opener) -> None:
    store = opened(tmp_path)
    for i in range(3):
        key, contents = block(2, i, SIZE)
        write(store, key, contents)
        os.utime(path_of(store, key), (1000 + i, 1000 + i))
    read(store, block(2, 0, SIZE)[0])
    assert [found.key for found in store.index()] == [block(2, i, SIZE)[0] for i in (1, 2, 0)]


def test_the_index_passes_over_what_is_no_block_and_removes_torn_ones(tmp_path: Path, opened: Opener) -> None:
    store = opened(tmp_path)
    write(store, KEY, CONTENTS)
    write(store, KEY2, CONTENTS2)
    torn = path_of(store, KEY2)
    torn.write_bytes(torn.read_bytes()[:-1])
    path_of(store, KEY).with_name("notes.txt").write_text("mine")
    assert [found.key for found in store.index()] == [KEY]
    assert not torn.exists()
    assert path_of(store, KEY).with_name("notes.txt").exists()


# --- corruption


def corruptions(rng: random.Random, good: bytes, other: bytes) -> bytes:
    """A damaged copy of `good`: what disks, crashes and people do to files."""
    kind = rng.randrange(7)
    at = rng.randrange(len(good))
    if kind == 0:
        return good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :]
    if kind == 1:
        return good[:at]
    if kind == 2:
        return good + rng.randbytes(rng.randrange(1, 5000))
    if kind == 3:
        return other
    start = at // 512 * 512  # a lost or misdirected sector
    sector = bytes(512) if kind == 4 else other[start : start + 512] if kind == 5 else rng.randbytes(512)
    return good[:start] + sector + good[start + 512 :]


@pytest.mark.parametrize("place", ["directory", "URL"])
def test_a_thousand_random_corruptions_are_all_found_counted_and_deleted(
    place: str, tmp_path: Path, opened: Opener
) -> None:
    local = opened(tmp_path, direct=False)
    store = local if place == "directory" else opened(f"file://{tmp_path}")
    write(local, KEY, CONTENTS)
    write(local, KEY2, CONTENTS2)
    path, other = path_of(local, KEY), path_of(local, KEY2).read_bytes()
    good = path.read_bytes()
    rng = random.Random(4)
    damaged = 0
    while damaged < 1000:
        bad = corruptions(rng, good, other)
        if bad == good:
            continue
        path.write_bytes(bad)
        completion, _ = read(store, KEY)
        assert completion.outcome is Outcome.CORRUPT, completion
        assert not path.exists()
        damaged += 1
    path.write_bytes(good)
    assert read(store, KEY)[1] == CONTENTS


def test_a_block_of_another_model_or_version_is_no_block_of_this_one(tmp_path: Path, opened: Opener) -> None:
    ours, theirs = opened(tmp_path, "ours"), opened(tmp_path, "theirs")
    write(ours, KEY, CONTENTS)
    write(theirs, KEY, CONTENTS)
    shutil.copy(path_of(theirs, KEY), path_of(ours, KEY))
    completion, _ = read(ours, KEY)
    assert (completion.outcome, "another model" in completion.detail) == (Outcome.CORRUPT, True)


# --- faults


def test_a_full_disk_fails_the_write_and_leaves_nothing_then_recovers(tmp_path: Path, opened: Opener) -> None:
    """A limit on file size stands for the full disk: the write ends half-way with an error, and no root is needed."""
    store = opened(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER_BYTES + 4096, hard))
    try:
        completion = write(store, KEY, CONTENTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (completion.outcome, completion.num_bytes) == (Outcome.FAILED, 0)
    assert "File too large" in completion.detail
    assert store.index() == []
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["about.json", "lock"]
    assert write(store, KEY, CONTENTS).outcome is Outcome.OK


def test_a_read_error_is_a_failure_not_a_miss_and_the_next_block_is_read(tmp_path: Path, opened: Opener) -> None:
    store = opened(tmp_path)
    write(store, KEY, CONTENTS)
    write(store, KEY2, CONTENTS2)
    path_of(store, KEY).unlink()
    path_of(store, KEY).symlink_to(path_of(store, KEY))  # ELOOP: open fails otherwise than by a missing file
    completion, _ = read(store, KEY)
    assert (completion.outcome, "symbolic links" in completion.detail) == (Outcome.FAILED, True)
    assert read(store, KEY2)[1] == CONTENTS2


def test_files_deleted_under_the_store_are_missing(tmp_path: Path, opened: Opener) -> None:
    store = opened(tmp_path)
    write(store, KEY, CONTENTS)
    path_of(store, KEY).unlink()
    assert read(store, KEY)[0].outcome is Outcome.MISSING


def test_a_directory_that_vanishes_is_made_again(tmp_path: Path, opened: Opener) -> None:
    store = opened(tmp_path)
    write(store, KEY, CONTENTS)
    shutil.rmtree(path_of(store, KEY).parents[1])
    assert read(store, KEY)[0].outcome is Outcome.MISSING
    assert write(store, KEY, CONTENTS).outcome is Outcome.OK
    assert read(store, KEY)[1] == CONTENTS


def test_a_file_system_that_vanishes_is_not_replaced_by_what_lies_below(tmp_path: Path, opened: Opener) -> None:
    store = opened(tmp_path / "mounted")
    write(store, KEY, CONTENTS)
    (tmp_path / "mounted").rename(tmp_path / "elsewhere")
    assert write(store, KEY, CONTENTS).outcome is Outcome.FAILED
    assert read(store, KEY)[0].outcome is Outcome.MISSING
    (tmp_path / "elsewhere").rename(tmp_path / "mounted")
    assert write(store, KEY2, CONTENTS2).outcome is Outcome.OK
    assert read(store, KEY)[1] == CONTENTS


@pytest.fixture
def stuck(tmp_path: Path, opened: Opener) -> Iterator[tuple[DiskStore, Callable[[], None]]]:
    """A store in which reading KEY blocks, as on a dead network disk, until the function is called. KEY2 is fine."""
    store = opened(tmp_path, direct=False, read_threads=1)
    write(store, KEY, CONTENTS)
    write(store, KEY2, CONTENTS2)
    path_of(store, KEY).unlink()
    os.mkfifo(path_of(store, KEY))  # opening it waits for a writer
    held = []

    def release() -> None:
        held.append(os.open(path_of(store, KEY), os.O_RDWR | os.O_NONBLOCK))

    yield store, release
    if not held:
        release()
    store.close()
    os.close(held[0])


def test_a_stuck_device_stops_neither_the_caller_nor_close(
    stuck: tuple[DiskStore, Callable[[], None]],
) -> None:
    store, release = stuck
    buffers = [bytearray(SIZE) for _ in range(3)]
    store.read(1, KEY, buffers[0])
    wait_until(lambda: store._jobs[1].started)
    store.read(2, KEY2, buffers[1])
    store.read(3, KEY2, buffers[2])
    assert store.poll() == []
    assert not store.cancel(1)
    assert store.cancel(2)
    assert not store.cancel(2)
    store.write(4, KEY2, CONTENTS2)
    assert finish(store, 1)[4].outcome is Outcome.OK
    before = time.monotonic()
    assert store.close(timeout_s=0.2) == 1
    assert time.monotonic() - before < 5
    assert [(c.ticket, c.outcome, c.detail) for c in store.poll()] == [(3, Outcome.FAILED, "closed")]
    release()
    assert finish(store, 1)[1].outcome in (Outcome.CORRUPT, Outcome.FAILED)


def test_a_cancelled_read_leaves_its_buffer_alone(stuck: tuple[DiskStore, Callable[[], None]]) -> None:
    store, release = stuck
    untouched = bytearray(SIZE)
    store.read(1, KEY, bytearray(SIZE))
    wait_until(lambda: store._jobs[1].started)
    store.read(2, KEY2, untouched)
    assert store.cancel(2)
    release()
    finish(store, 1)
    assert read(store, KEY2)[1] == CONTENTS2
    assert untouched == bytes(SIZE)


def test_a_process_with_a_stuck_read_can_end(tmp_path: Path, opened: Opener) -> None:
    store = opened(tmp_path)
    write(store, KEY, CONTENTS)
    path_of(store, KEY).unlink()
    os.mkfifo(path_of(store, KEY))
    program = f"""
        import time
        from jserve.cache.disk_store import DiskStore
        store = DiskStore.open({str(tmp_path)!r}, "model", {SIZE})
        store.read(1, bytes.fromhex({KEY.hex()!r}), bytearray({SIZE}))
        time.sleep(0.1)
        print(store.close(timeout_s=0.1))
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, b"1\n")


def test_close_lets_writes_end_and_refuses_what_comes_later(tmp_path: Path, opened: Opener) -> None:
    store = opened(tmp_path)
    for i in range(50):
        store.write(i, *block(3, i, SIZE))
    assert store.close() == 0
    assert {c.outcome for c in finish(store, 50).values()} == {Outcome.OK}
    store.read(60, KEY, bytearray(SIZE))
    assert finish(store, 1)[60] == DiskCompletion(60, Operation.READ, Outcome.FAILED, "closed", 0.0, 0)
    assert not list(Path(tmp_path).glob("*/writers/*"))


# --- several processes


def run_writer(directory: Path, size: int, count: int, seed: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, WRITER, directory, *map(str, (size, count, seed))], stdout=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    return process


def test_two_servers_share_a_directory(tmp_path: Path, opened: Opener) -> None:
    """One process writes blocks while this one writes the same ones and reads them: whole, or not there yet."""
    count = 400
    other = run_writer(tmp_path, SIZE, count, seed=5)
    try:
        store = opened(tmp_path)
        outcomes = set()
        for i in range(count):
            key, contents = block(5, i, SIZE)
            if i % 2:
                assert write(store, key, contents).outcome is Outcome.OK
            completion, found = read(store, key)
            outcomes.add(completion.outcome)
            assert completion.outcome is not Outcome.OK or found == contents
        assert other.wait(60) == 0
    finally:
        other.kill()
        other.communicate()
    assert outcomes <= {Outcome.OK, Outcome.MISSING}
    assert len(store.index()) == count
    assert all(read(store, key)[1] == contents for key, contents in (block(5, i, SIZE) for i in range(count)))


def test_an_opening_server_leaves_the_temporary_files_of_a_living_one(tmp_path: Path, opened: Opener) -> None:
    living = opened(tmp_path)
    mine = Path(living.files._writer) / "half"  # type: ignore[attr-defined]
    mine.write_bytes(b"half a block")
    opened(tmp_path).index()
    assert mine.exists()


def test_killed_in_the_middle_of_writes_no_block_is_wrong_and_nothing_is_left(tmp_path: Path, opened: Opener) -> None:
    size, rng = 1 << 20, random.Random(6)
    for seed in range(8):
        process = run_writer(tmp_path, size, 10_000, seed)
        time.sleep(rng.uniform(0.005, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        store = opened(tmp_path, size=size, direct=False)
        stored = {found.key for found in store.index()}
        writers = list(Path(tmp_path).glob("*/writers/*"))
        assert writers == [store.files._writer]  # type: ignore[attr-defined]
        expected = dict(block(seed, i, size) for i in range(len(stored) + 16))
        for key in stored:
            completion, contents = read(store, key)
            assert completion.outcome is Outcome.OK
            assert contents == expected[key]
            path_of(store, key).unlink()
        store.close()


# --- opening


def test_models_and_block_sizes_have_folders_of_their_own_which_go_only_when_asked(
    tmp_path: Path, opened: Opener
) -> None:
    for fingerprint, size in (("a", SIZE), ("b", SIZE), ("a", 2 * SIZE)):
        write(opened(tmp_path, fingerprint, size), KEY, CONTENTS * (size // SIZE))
    models = stored_models(tmp_path)
    assert sorted((m.fingerprint, m.block_bytes, m.num_blocks, m.num_bytes) for m in models) == [
        ("a", SIZE, 1, HEADER_BYTES + SIZE),
        ("a", 2 * SIZE, 1, HEADER_BYTES + 2 * SIZE),
        ("b", SIZE, 1, HEADER_BYTES + SIZE),
    ]
    remove_model(next(m for m in models if m.fingerprint == "b"))
    assert read(opened(tmp_path, "b"), KEY)[0].outcome is Outcome.MISSING
    assert read(opened(tmp_path, "a"), KEY)[1] == CONTENTS


def test_a_place_that_cannot_hold_blocks_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for location in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/kv"), "nonsense://bucket/path"):
        with pytest.raises(ConfigError, match=r"(?s)kept in .*(file|proc|nonsense).*serve without a disk tier"):
            DiskStore.open(location, "model", SIZE)


def test_the_engine_is_woken_by_each_completion(tmp_path: Path, opened: Opener) -> None:
    woken = threading.Event()
    store = opened(tmp_path, on_completion=woken.set)
    store.write(1, KEY, CONTENTS)
    assert woken.wait(30)
    assert len(store.poll()) == 1


def test_wrong_buffers_and_tickets_in_use_are_the_callers_mistake(
    stuck: tuple[DiskStore, Callable[[], None]],
) -> None:
    store, _ = stuck
    for buffer in (bytearray(SIZE - 1), bytes(SIZE), np.zeros((2, SIZE), np.uint8)[:, ::2]):
        with pytest.raises(ValueError, match="contiguous bytes"):
            store.read(1, KEY2, buffer)
    store.read(1, KEY, bytearray(SIZE))
    with pytest.raises(ValueError, match="in use"):
        store.delete(1, KEY2)
