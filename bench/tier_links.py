"""Copies between device and host as the hierarchy makes them, against one plain copy of as many bytes.

The tier's way: `JaxTransfer` gathers 16 blocks out of the pool and copies them, or copies them in and scatters them.
The plain way: one `jax.device_put` between device memory and pinned host memory (on CPU both are plain memory). The
four take turns.
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

BATCH = 16
"""Blocks of one copy: what the hierarchy stores in one step."""


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


def measure(runner: Runner, turns: int, tick: Callable[[], None] = lambda: None) -> tuple[Link, Link]:
    """Device to host and host to device. What this leaves in the runner's pool nobody may look for."""
    transfer = JaxTransfer(runner)
    blocks = list(range(min(BATCH, runner.info.device_blocks)))
    num_bytes = len(blocks) * runner.block_bytes
    layers, *rest = runner.programs.block_shape()
    here = np.ones((len(blocks) * layers, *rest), runner.programs.dtype)
    device = jax.block_until_ready(jax.device_put(here, runner.block_sharding))
    out, back = Link(num_bytes), Link(num_bytes)

    def plain_out() -> jax.Array:
        host: jax.Array = jax.block_until_ready(jax.device_put(device, runner.host_sharding))
        return host

    host = plain_out()
    for turn in range(turns + 1):
        times_s = (
            _seconds(plain_out),
            _seconds(lambda: _store(transfer, blocks)),
            _seconds(lambda: jax.block_until_ready(jax.device_put(host, runner.block_sharding))),
            _seconds(lambda: _load(runner, transfer, blocks)),
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
    jax.block_until_ready(runner.gather(blocks[:1]))


def _wait(transfer: JaxTransfer) -> None:
    while not (ended := transfer.poll()):
        time.sleep(0)
    if ended[0].error is not None:
        raise OSError(f"a copy failed: {ended[0].error}")


def _seconds(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s
