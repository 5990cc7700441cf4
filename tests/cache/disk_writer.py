"""A process that writes blocks until all are written or it is killed: `disk_writer.py DIRECTORY BLOCK_BYTES COUNT SEED`

Block i of a seed has the key and contents that `block(seed, i, size)` gives, so that any other process can check it.
"""

from __future__ import annotations

import random
import sys
import time

from jserve.cache.disk_store import DiskStore, Outcome


def block(seed: int, i: int, size: int) -> tuple[bytes, bytes]:
    """Key and contents."""
    made = random.Random(f"{seed} {i}")
    return made.randbytes(16), made.randbytes(64) * (size // 64)


def main(directory: str, size: int, count: int, seed: int) -> None:
    store = DiskStore.open(directory, "model", size)
    print("open", flush=True)
    i = done = 0
    while done < count:
        while i < count and store.num_pending < 8:
            store.write(i, *block(seed, i, size))
            i += 1
        for completion in store.poll():
            assert completion.outcome is Outcome.OK, completion
            done += 1
        time.sleep(0.0005)
    store.close()
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
