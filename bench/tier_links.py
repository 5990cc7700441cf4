"""Copies between device and host as the hierarchy makes them, against one plain copy of as many bytes.

The tier's way is `JaxTransfer`'s, from the start of a copy until `poll` tells of its end and the pool is at rest. On a
GPU it gathers blocks out of the pool and copies them, or copies them in and scatters them; on CPU it copies them
straight between the pool's 2 x layers arrays and the host's slots. The plain way is one `jax.device_put` of one array
between device memory and pinned host memory, which on CPU are both plain memory. The two take turns, and what counts
is the median of the ratio of two that were timed one right after the other. How quick either is depends on where its
memory happens to lie (huge pages, caches) for as long as it lies there, so that all of it is taken anew some times.

They are measured for a history of 64 blocks, which is what is worth loading, and for the 16 that one step may store.
Where blocks are small, the latter shows what starting a program over that many arrays takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles

import jax
import numpy as np

from jserve.runner import Runner
from jserve.transfer import JaxTransfer

HISTORY, STEP = 64, 16
"""Blocks of one copy."""
PLACES = 5
"""How often memory is taken anew."""


@dataclass(frozen=True, slots=True)
class Link:
    """One direction: seconds of each copy, of `num_bytes` bytes."""

    num_bytes: int
    tier_s: list[float] = field(default_factory=list)
    plain_s: list[float] = field(default_factory=list)

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / median(self.tier_s)

    @property
    def plain_bytes_per_s(self) -> float:
        return self.num_bytes / median(self.plain_s)

    @property
    def share(self) -> float:
        return median(self._shares)

    @property
    def share_spread(self) -> tuple[float, float]:
        """Half of all pairs lie between these."""
        low, _, high = quantiles(self._shares, n=4)
        return low, high

    @property
    def _shares(self) -> list[float]:
        return [plain_s / tier_s for plain_s, tier_s in zip(self.plain_s, self.tier_s, strict=True)]


def measure(
    runner: Runner, turns: int, tick: Callable[[], None] = lambda: None, *, blocks: int = HISTORY
) -> tuple[Link, Link]:
    """Device to host and host to device, `turns` times at each of `PLACES`. What this leaves in the pool is for
    nobody to find."""
    blocks = min(blocks, runner.info.device_blocks)
    links = Link(blocks * runner.block_bytes), Link(blocks * runner.block_bytes)
    for _ in range(PLACES):
        _measure_here(runner, list(range(blocks)), turns, tick, *links)
    return links


def _measure_here(
    runner: Runner, blocks: list[int], turns: int, tick: Callable[[], None], out: Link, back: Link
) -> None:
    transfer = JaxTransfer(runner)
    layers, *rest = runner.programs.block_shape()
    here = np.ones((len(blocks) * layers, *rest), runner.programs.dtype)
    device = jax.block_until_ready(jax.device_put(here, runner.block_sharding))
    host = jax.block_until_ready(jax.device_put(device, runner.host_sharding))
    ways: list[tuple[Callable[[], object], list[float]]] = [
        (lambda: jax.block_until_ready(jax.device_put(device, runner.host_sharding)), out.plain_s),
        (lambda: _store(transfer, blocks), out.tier_s),
        (lambda: jax.block_until_ready(jax.device_put(host, runner.block_sharding)), back.plain_s),
        (lambda: _load(runner, transfer, blocks), back.tier_s),
    ]
    for turn in range(turns + 1):
        for first, second in (ways[:2], ways[2:]):
            for run, times_s in (first, second) if turn % 2 else (second, first):
                taken_s = _seconds(run)
                if turn:  # the first of each is slow
                    times_s.append(taken_s)
        tick()
    transfer.close()


def _store(transfer: JaxTransfer, blocks: list[int]) -> None:
    transfer.store(1, blocks, blocks)
    _wait(transfer)


def _load(runner: Runner, transfer: JaxTransfer, blocks: list[int]) -> None:
    """Until the blocks are in the pool: the completion tells that the scatter is launched, reading tells its end."""
    transfer.load(2, blocks, blocks)
    _wait(transfer)
    runner.wait()


def _wait(transfer: JaxTransfer) -> None:
    while not (ended := transfer.poll()):
        time.sleep(0)
    if ended[0].error is not None:
        raise OSError(f"a copy failed: {ended[0].error}")


def _seconds(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s
