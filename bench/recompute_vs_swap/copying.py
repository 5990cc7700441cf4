"""What copying some blocks takes by itself: out to the host and in again, from pinned memory or from pageable."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import jax
import numpy as np

from jserve.batch import COPY_BUCKETS
from jserve.host_slots import parts_of
from jserve.runner import Runner
from jserve.transfer import JaxTransfer

TURNS = 3


@dataclass(frozen=True)
class Copied:
    """Medians, in seconds."""

    out_s: float
    in_s: float


def pinned(runner: Runner, blocks: int) -> Copied:
    """As the hierarchy copies: in pinned memory, or on a CPU in memory of one kind with the device's."""
    transfer, places = JaxTransfer(runner), list(range(blocks))

    def wait() -> None:
        while not transfer.poll():
            time.sleep(0)

    def out() -> None:
        transfer.store(1, places, places)
        wait()

    def back() -> None:
        transfer.load(2, places, places)
        wait()
        runner.wait()

    copied = Copied(_seconds(out), _seconds(back))
    transfer.close()
    return copied


def pageable(runner: Runner, blocks: int) -> Copied:
    """The same blocks through ordinary NumPy arrays, as a program copies that asks for nothing else."""
    parts = [list(part) for part in parts_of(range(blocks), COPY_BUCKETS[-1])]
    held: list[list[np.ndarray]] = []

    def out() -> None:
        held[:] = [[np.array(array) for array in runner.gather(part)] for part in parts]

    def back() -> None:
        for part, arrays in zip(parts, held, strict=True):
            runner.scatter(part, jax.device_put(arrays, runner.block_sharding))
        runner.wait()

    return Copied(_seconds(out), _seconds(back))


def _seconds(run: Callable[[], None]) -> float:
    """The first time is slow."""
    times_s = []
    for _ in range(TURNS + 1):
        start_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - start_s)
    return median(times_s[1:])
