"""The doors between the pure core and the world: Executor (compute), Transfer (copies) and Clock (time).

Transfer is in `jserve.cache.transfer`, beside the hierarchy that uses it.

Behind each stands the real thing in production and a simulated one (`jserve.simulated`) in tests and simulations;
scheduler and cache cannot tell which.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from jserve.request import TokenLogprobs
from jserve.sched.plan import StepPlan


@dataclass(frozen=True)
class EngineInfo:
    """What an engine serves, and within which limits."""

    model: str
    fingerprint: str
    """Part of every block's key: the model's name, shape and dtype, and its weights where KV outlives the process."""
    vocab_size: int
    max_model_len: int
    block_size: int
    device_blocks: int
    token_budget: int
    """Tokens of one step at most."""
    dtype: str
    backend: str
    """Platform and attention backend, as in `cpu/native`."""
    weight_bytes: int
    pool_bytes: int


@dataclass(slots=True)
class StepResult:
    """What a step has sampled: one entry for each of the plan's sampling rows, in their order."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    """None if no row asked for log-probabilities."""


class LaunchedStep(Protocol):
    """A step on its way."""

    @property
    def pack_s(self) -> float:
        """Host time that packing it has taken."""

    def read(self) -> StepResult:
        """Wait for the step's end. Called once."""


class Executor(Protocol):
    """Runs step plans, in launch order."""

    @property
    def compiles_after_warmup(self) -> int:
        """Programs compiled while serving: 0, or something is wrong."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """What the engine does within is shown under this name where the executor is profiled."""

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start a step and return at once. The plan's sequences may change afterwards."""

    def close(self) -> None:
        """Give the device back. Called once, with no step under way."""


class Clock(Protocol):
    """The engine's only source of time."""

    def now(self) -> float:
        """Seconds since an arbitrary start; never goes back."""

    def wait(self, seconds: float) -> None:
        """Let so much time pass: there is nothing to do but to wait for copies."""


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)
