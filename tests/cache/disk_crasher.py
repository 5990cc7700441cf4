"""Forks processes that write, overwrite and delete blocks in one directory, and kills each in the middle of that.

    disk_crasher.py DIRECTORY KILLS SEED FINGERPRINT BLOCKS.npy [FINGERPRINT BLOCKS.npy]...

A row of BLOCKS.npy is a key followed by the block's contents. Prints how many of the killed left a half-written file.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from jserve.cache.disk_store import DiskStore

KEY_BYTES = 16
LONGEST_LIFE_S = 20


def write_for_ever(directory: Path, models: list[tuple[str, np.ndarray]], seed: int, ready_fd: int) -> None:
    """As servers do: open, list what is there, write. Several models at once, each as fast as its store takes it."""
    signal.alarm(LONGEST_LIFE_S)  # in case whoever should kill us has been killed
    rng = random.Random(seed)
    stores = []
    for fingerprint, rows in models:
        store = DiskStore.open(directory, fingerprint, rows.shape[1] - KEY_BYTES, read_threads=1, write_threads=2)
        store.index()
        stores.append((store, rows))
    os.write(ready_fd, b"!")
    ticket = 0
    while True:
        for store, rows in stores:
            store.poll()
            while store.num_pending < 4:
                ticket += 1
                row = rows[rng.randrange(len(rows))]
                key = row[:KEY_BYTES].tobytes()
                if rng.random() < 0.2:
                    store.delete(ticket, key)
                else:
                    store.write(ticket, key, row[KEY_BYTES:])
        time.sleep(0.0002)


def main(directory: Path, kills: int, seed: int, models: list[tuple[str, np.ndarray]]) -> None:
    rng = random.Random(seed)
    torn = 0
    for turn in range(kills):
        ready, its_end = os.pipe()
        child = os.fork()
        if child == 0:
            write_for_ever(directory, models, seed + turn, its_end)
        os.close(its_end)
        assert os.read(ready, 1) == b"!", "the writer ended by itself"
        os.close(ready)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        torn += any(path.name != "lock" for path in directory.glob("*/writers/*/*"))
    print(torn)


if __name__ == "__main__":
    place, count, first, *said = sys.argv[1:]
    given = [(name, np.load(file)) for name, file in zip(said[::2], said[1::2], strict=True)]
    main(Path(place), int(count), int(first), given)
