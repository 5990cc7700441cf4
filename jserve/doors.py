"""The three doors between the pure core and the world: Executor (compute), Transfer (copies) and Clock (time).

Behind each stands the real thing in production and a simulated one (`jserve.simulated`) in tests and simulations;
scheduler and cache cannot tell which.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from jserve.request import TokenLogprobs
from jserve.sched.plan import StepPlan


@dataclass(frozen=True)
class EngineInfo:
    """What an engine serves, and within which limits."""

    model: str
    fingerprint: str
    """Part of every block's key: the model's name, shape and dtype. Not its weights: it may not outlive the process."""
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

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start a step and return at once. The plan's sequences may change afterwards."""

    def close(self) -> None:
        """Give the device back. Called once, with no step under way."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of one copy. `ticket` is the caller's own name for it."""

    ticket: int
    error: str | None = None


class Transfer(Protocol):
    """Copies KV blocks between the device pool and host memory. Copies end in any order; `poll` tells which did.

    Stale completions are the caller's to drop: a ticket is never reused.
    """

    def store(self, ticket: int, blocks: list[int], host_slots: list[int]) -> None:
        """Start copying device blocks to host slots. The device blocks may be overwritten by later steps at once."""

    def load(self, ticket: int, host_slots: list[int], blocks: list[int]) -> None:
        """Start copying host slots to device blocks. Steps may read them after the completion has been polled."""

    def poll(self) -> list[Completion]:
        """The copies that have ended since the last call. Never waits."""


class Clock(Protocol):
    """The engine's only source of time."""

    def now(self) -> float:
        """Seconds since an arbitrary start; never goes back."""


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()
