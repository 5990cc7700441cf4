"""Copies between device and host as the hierarchy makes them, against one plain copy of as many bytes.

The tier's way is `JaxTransfer`'s, from the start of a copy until `poll` tells of its end and the pool is at rest. On a
GPU it gathers blocks out of the pool and copies them, or copies them in and scatters them; on CPU it copies them
straight between the pool's 2 x layers arrays and the host's slots. The plain way is one `jax.device_put` of one array
between device memory and pinned host memory, which on CPU are both plain memory. The four take turns.

They are measured for a history of 64 blocks, which is what is worth loading, and for the 16 that one step may store.
Where blocks are small, the latter shows what starting a program over that many arrays takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import jax
import numpy as np

from jserve.runner import Runner
from jserve.transfer import JaxTransfer

HISTORY, STEP = 64, 16
"""Blocks of one copy."""


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
        return self.bytes_per_s / self.plain_bytes_per_s


def measure(
    runner: Runner, turns: int, tick: Callable[[], None] = lambda: None, *, blocks: int = HISTORY
) -> tuple[Link, Link]:
    """Device to host and host to device. What this leaves in the runner's pool nobody may look for."""
    transfer = JaxTransfer(runner)
    places = list(range(min(blocks, runner.info.device_blocks)))
    num_bytes = len(places) * runner.block_bytes
    layers, *rest = runner.programs.block_shape()
    here = np.ones((len(places) * layers, *rest), runner.programs.dtype)
    device = jax.block_until_ready(jax.device_put(here, runner.block_sharding))
    out, back = Link(num_bytes), Link(num_bytes)

    def plain_out() -> jax.Array:
        host: jax.Array = jax.block_until_ready(jax.device_put(device, runner.host_sharding))
        return host

    host = plain_out()
    for turn in range(turns + 1):
        times_s = (
            _seconds(plain_out),
            _seconds(lambda: _store(transfer, places)),
            _seconds(lambda: jax.block_until_ready(jax.device_put(host, runner.block_sharding))),
            _seconds(lambda: _load(runner, transfer, places)),
        )
        if turn:  # the first of each is slow
            for into, taken_s in zip((out.plain_s, out.tier_s, back.plain_s, back.tier_s), times_s, strict=True):
                into.append(taken_s)
        tick()
    transfer.close()
    return out, back


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
