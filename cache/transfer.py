"""The Transfer door: copies of KV blocks between the device pool, host memory and disk, started and polled.

The hierarchy decides what to copy; behind this protocol stand real copies (`jserve.transfer`) or simulated ones.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

STORES_BESIDE_POOL, LOADS_BESIDE_POOL = 64, 64
"""Blocks on their way from and to the pool, which take device memory beside it: so many at once, and no more."""
LEAST_STORES = 16
LOAD_AT_ONCE_BYTES = 16 << 20
"""What is copied in between two steps where both use the same memory: a few milliseconds."""


def stores_a_step(token_budget: int, block_size: int) -> int:
    """Blocks that write-through copies after a step at most: as many as a step of prompts fills, else what computes
    prompts for long would never be kept; and no more than may be on their way."""
    return max(LEAST_STORES, min(STORES_BESIDE_POOL, token_budget // block_size))


class Completion(msgspec.Struct, frozen=True, gc=False):
    """The end of one operation. `ticket` is the caller's own name for it."""

    ticket: int
    error: str | None = None
    """What went wrong; the destination then holds nothing."""
    device_fault: bool = False
    """With an error: whether the disk as such failed, and not only this block was missing or damaged."""
    corrupt: bool = False
    """With an error: whether the block was damaged."""
    seconds: float = 0.0
    """What it took, or less: an end is seen when somebody polls. 0 if nothing is known."""
    least_s: float = 0.0
    """What it took, or more."""
    num_bytes: int = 0


class Transfer(Protocol):
    """Every operation has a ticket of its own, ends in any order, and is told of by `poll`, once if all is well.

    The caller keeps a source alone until the operation has ended, and a destination too; or until `cancel`.
    """

    in_turn: bool
    """Whether copies between device and host have their turn among the steps. Then they are as late as these, and no
    link can hang."""

    def store(self, ticket: int, blocks: list[int], host_slots: list[int]) -> None:
        """Device to host. The device blocks may be overwritten by later steps at once."""

    def load(self, ticket: int, host_slots: list[int], blocks: list[int]) -> bool:
        """Host to device. Steps that are launched after the completion was polled may read the blocks.

        True if every step launched from now on may: where steps and copies go through one queue, they wait for each
        other without being told to. Such a load cannot fail; its completion tells that the source is free.
        """

    def write(self, ticket: int, host_slot: int, key: bytes) -> None:
        """Host to disk."""

    def read(self, ticket: int, key: bytes, host_slot: int) -> None:
        """Disk to host."""

    def delete(self, key: bytes) -> None:
        """From disk. Nothing tells of its end."""

    def cancel(self, ticket: int) -> None:
        """The operation touches neither source nor destination any more. Unknown tickets are ignored."""

    def poll(self) -> list[Completion]:
        """The operations that have ended since the last call. Never waits."""

    def close(self) -> None:
        """End what is under way, within a few seconds."""
