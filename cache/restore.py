"""What the hierarchy has under way: for each request (`Restore`), and for each ticket of the Transfer door."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from jserve.cache.host_tier import HostTier
from jserve.cache.kv_cache import BlockTable

if TYPE_CHECKING:
    from jserve.cache.gap import Gap

ENDLESS = 1 << 60
LATE = "a copy to the device takes too long"


@dataclass(slots=True, eq=False)
class Restore:
    """What one request, waiting or loading, has under way in the tiers. It hangs on the request's block table.

    Of the prefix, in blocks: settled <= next_read <= split <= wanted, while the request waits.
    """

    table: BlockTable
    num_tokens: int
    """Of the prompt."""
    since_s: float = 0.0
    """When it came."""
    prefill_s: float = 0.0
    """What computing the whole prompt is predicted to take: as long as it waits, it hides the reads of others."""
    split: int = 0
    """Leading blocks that may come from below the device; the rest is computed."""
    wanted: int = 0
    """The same, had the staging region endless room."""
    next_read: int = 0
    """The first block that is still to be asked for from disk."""
    settled: int = 0
    """Leading blocks that nobody waits for."""
    above_disk: int = ENDLESS
    """Leading blocks that device or host had when the request came."""
    pin: bytes | None = None
    """The last of its blocks on the host, pinned, and so all before it."""
    staging: int = 0
    """Blocks of the staging region that it takes, or was promised."""
    reading: int = 0
    """Reads for it under way."""
    ended: bool = False
    deadline_s: float = 0.0
    load_ticket: int | None = None
    loaded: bool | None = None
    """None while the load is under way, then whether it has succeeded."""
    device_blocks: int = 0
    """While loading: leading blocks that needed no load."""
    reach_blocks: int = 0
    """While loading: leading blocks that are there once it has succeeded."""

    @property
    def num_unread(self) -> int:
        """Blocks that are still to be asked for from disk."""
        return self.split - self.next_read

    def keep(self, host: HostTier, count: int) -> None:
        """Pin what the host has of the first `count` blocks, and nothing else."""
        here = host.reach(self.table.keys, count)
        key = self.table.keys[here - 1] if here else None
        if key == self.pin:
            return
        if key is not None:
            host.pin(key)
        if self.pin is not None:
            host.unpin(self.pin)
        self.pin = key


class Store(msgspec.Struct, gc=False):
    """Device to host, of blocks whose slots are being filled."""

    keys: list[bytes]
    start_s: float


class Load(msgspec.Struct, gc=False):
    """Host to device, for one request."""

    restore: Restore
    blocks: int
    pins: list[bytes]
    """The last of each run of its source blocks."""
    start_s: float


class Read(msgspec.Struct, gc=False):
    """Disk to host, of one block."""

    key: bytes
    version: int | None
    """Of the copy that is read (`DiskTier.version`)."""
    restore: Restore | None
    """The request that it is for; None if it is read ahead."""
    start_s: float


class Write(msgspec.Struct, gc=False):
    """Host to disk, of one block, which is pinned."""

    key: bytes
    start_s: float


class GapRead(msgspec.Struct, gc=False):
    """Disk to a host slot of one request's own, of one block of its gap."""

    key: bytes
    version: int | None
    gap: Gap
    block: int
    """Of the request."""
    start_s: float


class GapLoad(msgspec.Struct, gc=False):
    """Host to device, of blocks of one request's gap."""

    gap: Gap
    blocks: list[int]
    """Of the request, in order."""
    pins: list[bytes]
    """The source blocks in the host tier."""
    slots: list[int]
    """The other sources."""
    start_s: float
    ordered: bool = False
    """Whether the steps after its start may use them (`Transfer.load`)."""


Operation = Store | Load | Read | Write | GapRead | GapLoad
