"""How long the device takes, without what launching costs; and the ceilings of the machine, measured alike.

Launches are asynchronous: many are sent, and only the last one's end is waited for, so that the device never waits for
the host as long as one launch takes longer than sending the next.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

ROUNDS = 5
ROUND_S = 0.02
"""Of the device's time in a round, about."""


def device_seconds(launch: Callable[[], Any], rounds: int = ROUNDS, round_s: float = ROUND_S) -> float:
    """Median over rounds of the mean time of one launch. What it returns must depend on all of its work."""
    jax.block_until_ready(launch())  # compiled, loaded, tuned
    start_s = time.perf_counter()
    jax.block_until_ready(launch())
    count = max(1, min(100, round(round_s / (time.perf_counter() - start_s))))
    times_s = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        for _ in range(count):
            last = launch()
        jax.block_until_ready(last)
        times_s.append((time.perf_counter() - start_s) / count)
    return median(times_s)


def copy_bandwidth(size_bytes: int) -> float:
    """Bytes a second, read and written counted, that the device moves in a large copy: the best of two ways."""
    held = [jnp.zeros(size_bytes // 4, jnp.float32)]
    touch = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no page is new
    copy = jax.jit(lambda x: jax.lax.optimization_barrier(x) + 0)

    def in_place() -> Any:
        held[0] = touch(held[0])
        return held[0]

    fastest_s = min(device_seconds(in_place), device_seconds(lambda: copy(held[0])))
    return 2 * size_bytes / fastest_s


def matmul_rate(size: int = 8192, dtype: Any = jnp.bfloat16) -> float:
    """Operations a second of a large product of random matrices: on zeros it would run faster."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=a.dtype))
    return float(2 * size**3 / device_seconds(lambda: product(a, b)))


@contextmanager
def stoppable() -> Iterator[None]:
    """A request to end (SIGTERM) becomes KeyboardInterrupt, so that what was measured can still be told."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
