"""What the hierarchy counts since its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TierStats:
    """Tokens are counted once, when a request first has its prefix; a tier is the one that had them when it came."""

    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    disk_hit_tokens: int = 0

    decisions: int = 0
    """Requests for which it was decided how much of their prefix to restore."""
    load_decisions: int = 0
    """Of them: those that load from the host,"""
    stage_decisions: int = 0
    """those that read from disk,"""
    recompute_decisions: int = 0
    """and those that compute blocks which a tier has."""
    deferred_requests: int = 0
    """Those that wait for room in the staging region."""
    staged_blocks: int = 0
    recomputed_blocks: int = 0
    """Blocks that a tier had, but that were computed again by decision."""
    gaps: int = 0
    """Requests that were computed from their front while the end of their prefix was brought (`gap`),"""
    closed_gaps: int = 0
    """and those for which that came."""
    swapped_blocks: int = 0
    """Blocks that were kept on the host for a preempted sequence."""

    read_ahead_blocks: int = 0
    """Blocks whose read from disk was started before anybody asked for them (`read_ahead`)."""
    read_ahead_hits: int = 0
    """Of them: those that the host had, or was getting, when their conversation came back,"""
    read_ahead_wasted: int = 0
    """and those that it had lost by then."""

    stored_blocks: int = 0
    loaded_blocks: int = 0
    read_blocks: int = 0
    written_blocks: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    store_s: float = 0.0
    """Of all copies together, each from its start until it was seen to have ended; so with load, read and write."""
    load_s: float = 0.0
    read_s: float = 0.0
    write_s: float = 0.0

    skipped_stores: int = 0
    """Blocks that were not written through: the host had no slot to give, or the device block was gone. They are tried
    again when a request uses them."""
    expired_waits: int = 0
    failed_stores: int = 0
    failed_loads: int = 0
    failed_reads: int = 0
    failed_writes: int = 0
    corrupt_blocks: int = 0
    """Blocks on disk whose checksum or header was wrong."""
