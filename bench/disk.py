"""The disk tier against plain sequential I/O: `python -m bench.disk --directory DIR`.

Plain: one thread, one file, one request a block, the same flags (direct or buffered), the same total. The disk tier:
`DiskStore`, a file a block, checksums made and checked. And the same blocks through TensorStore's file driver, as the
tier uses it for URLs: always buffered, so its writes end in the page cache. The three take turns, and reads start from
a cold page cache. Medians over the turns.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Result, add_arguments, console, emit, note, table
from jserve.cache.disk_files import Bytes, LocalFiles
from jserve.cache.disk_store import DiskStore, Outcome

DEPTH = 8  # operations that the tier has under way
SYSTEMS = ("plain", "disk tier", "TensorStore")


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second, one entry a turn."""

    write: list[float]
    read: list[float]


def measure(
    directory: Path, block_bytes: int, blocks: int, turns: int, *, direct: bool = True, seed: int = 0
) -> tuple[dict[str, Rates], bool]:
    """Rates by system, and whether I/O really was direct.

    All files stay until the end: ext4 passes over lately deleted inodes one by one when it makes new files, so that
    deleting between the turns would slow down whoever comes next. That takes 3 x turns x blocks x block_bytes.
    """
    rng = np.random.default_rng(seed)
    pool = np.frombuffer(mmap.mmap(-1, DEPTH * block_bytes), np.uint8).reshape(DEPTH, block_bytes)
    pool[...] = rng.integers(0, 256, pool.shape, dtype=np.uint8)
    keys = [rng.bytes(16) for _ in range(blocks)]
    rates = {system: Rates([], []) for system in SYSTEMS}
    with tempfile.TemporaryDirectory(dir=directory) as below:
        for turn, system in itertools.product(range(turns), SYSTEMS):
            folder = Path(below, str(turn), system.replace(" ", "-").rstrip(":/"))
            folder.mkdir(parents=True)
            if system == "plain":
                times = _plain(folder, pool, blocks, direct)
            else:
                location = f"file://{folder}" if system == SYSTEMS[2] else folder
                store = DiskStore.open(location, "bench", block_bytes, direct=direct)
                if isinstance(store.files, LocalFiles):
                    direct = store.files.direct
                times = _store(store, folder, pool, keys)
            for taken_s, into in zip(times, (rates[system].write, rates[system].read), strict=True):
                into.append(blocks * block_bytes / taken_s)
    return rates, direct


def _plain(folder: Path, pool: Bytes, blocks: int, direct: bool) -> tuple[float, float]:
    path, flags = folder / "plain", os.O_DIRECT if direct else 0

    def run(mode: int, move: Callable[[int, Any], int]) -> float:
        started_s = time.perf_counter()
        fd = os.open(path, mode | flags, 0o600)
        for i in range(blocks):
            if move(fd, [pool[i % DEPTH]]) != pool.shape[1]:
                raise OSError("a request was cut short: is the disk full?")
        os.close(fd)
        return time.perf_counter() - started_s

    write_s = run(os.O_WRONLY | os.O_CREAT, os.writev)
    _cool(folder)
    return write_s, run(os.O_RDONLY, os.readv)


def _store(store: DiskStore, folder: Path, pool: Bytes, keys: list[bytes]) -> tuple[float, float]:
    def run(start: Callable[[int, bytes, Bytes], None]) -> float:
        started_s, ended, given = time.perf_counter(), 0, 0
        while ended < len(keys):
            while given < len(keys) and given - ended < DEPTH:
                start(given, keys[given], pool[given % DEPTH])
                given += 1
            for completion in store.poll():
                if completion.outcome is not Outcome.OK:
                    raise OSError(f"{completion.operation.value}: {completion.detail}")
                ended += 1
            time.sleep(0.0002)
        return time.perf_counter() - started_s

    write_s = run(store.write)
    _cool(folder)
    read_s = run(store.read)
    store.close()
    return write_s, read_s


def _cool(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--block-bytes", type=int, default=8 << 20, help="default 8 MiB: Llama-2-7B, 16 tokens")
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--buffered", action="store_true", help="through the page cache, instead of direct")
    add_arguments(parser)
    args = parser.parse_args()
    if shutil.disk_usage(args.directory).free < 3 * (args.turns + 1) * args.blocks * args.block_bytes:
        parser.error(f"{args.directory} has no space for 3 x {args.turns} x {args.blocks} x {args.block_bytes} bytes")
    rates, direct = measure(
        args.directory, args.block_bytes, args.blocks, args.turns, direct=not args.buffered, seed=args.seed
    )
    screen = console(args)
    middle = {s: (statistics.median(r.write), statistics.median(r.read)) for s, r in rates.items()}
    title = f"{'direct' if direct else 'buffered'} I/O, {args.blocks} blocks of {args.block_bytes} bytes, GB/s"
    rows = [(system, write / 1e9, read / 1e9) for system, (write, read) in middle.items()]
    screen.print(table(title, ("", "write", "read"), rows))
    note(screen, "Medians; a machine that others use at the same time measures them too.")
    plain_write, plain_read = middle["plain"]
    metrics = {
        "disk_write_share": middle["disk tier"][0] / plain_write,
        "disk_read_share": middle["disk tier"][1] / plain_read,
        "tensorstore_write_share": middle[SYSTEMS[2]][0] / plain_write,
        "tensorstore_read_share": middle[SYSTEMS[2]][1] / plain_read,
        "plain_write_gb_per_s": plain_write / 1e9,
        "plain_read_gb_per_s": plain_read / 1e9,
    }
    config = {"block_bytes": args.block_bytes, "blocks": args.blocks, "turns": args.turns, "direct": direct}
    emit(Result("disk", metrics, config, args.seed), args)


if __name__ == "__main__":
    main()
