"""Builds the cache that a configuration asks for: the device pool alone, or the hierarchy over host memory and disk."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jserve.cache.cost import CostModel, restore_strategy
from jserve.cache.disk_tier import DiskTier
from jserve.cache.hierarchy import TieredCache
from jserve.cache.host_tier import HostTier
from jserve.cache.kv_cache import KVCache
from jserve.cache.transfer import stores_a_step
from jserve.calibrate import calibrated
from jserve.config import PINNED_LIMIT, EngineConfig, pinned_host_gib
from jserve.errors import ConfigError
from jserve.host_memory import available_host_bytes
from jserve.progress import Progress
from jserve.transfer import JaxTransfer

if TYPE_CHECKING:
    from jserve.cache.disk_store import DiskStore
    from jserve.runner import Runner


def build_cache(config: EngineConfig, runner: Runner, progress: Progress, cost: CostModel | None = None) -> KVCache:
    """`cost`: what was measured already, if it was. Raises ConfigError if a tier cannot be had."""
    said, info = config.cache, runner.info
    if not said.host_gib:
        return KVCache(info.device_blocks, info.block_size, reuse=said.prefix_cache)
    host_blocks = _host_blocks(said.host_gib, runner)
    store = open_disk(config, runner)
    transfer = JaxTransfer(runner, store)
    disk = None
    if store is not None:
        present = [block.key for block in store.index()]
        capacity = int(said.disk_gib * 2**30) // store.stored_bytes
        if capacity < 1:
            raise ConfigError(f"cache.disk_gib is {said.disk_gib}, less than one block: use more")
        disk = DiskTier(capacity, said.eviction, present)
        progress.note(f"disk tier: {len(present)} of at most {capacity} blocks are there from before")
    longest = -(-info.max_model_len // info.block_size)
    staging = longest if said.staging_gib is None else int(said.staging_gib * 2**30) // runner.block_bytes
    return TieredCache(
        info.device_blocks,
        info.block_size,
        transfer,
        HostTier(host_blocks, said.eviction),
        disk,
        cost=cost or calibrated(config, runner, transfer, progress),
        strategy=restore_strategy(said.restore),
        staging_blocks=min(staging, host_blocks),
        store_budget=stores_a_step(info.token_budget, info.block_size),
        wait_limit_s=said.load_timeout_s,
        device_reuse=said.device_reuse,
        read_ahead_s=said.read_ahead_s,
        note=progress.note,
    )


def _host_blocks(host_gib: float, runner: Runner) -> int:
    block_bytes, pinned_gib = runner.block_bytes, pinned_host_gib()
    blocks = int(host_gib * 2**30) // block_bytes
    if not runner.shares_cores and host_gib > pinned_gib:
        raise ConfigError(
            f"cache.host_gib is {host_gib}, and XLA pins {pinned_gib:g} GiB of host memory at most: start with "
            f"{PINNED_LIMIT}={math.ceil(host_gib + 1)} in the environment, or use less"
        )
    if blocks < 1:
        raise ConfigError(
            f"cache.host_gib is {host_gib}, less than one block of {block_bytes / 2**20:.1f} MiB: use more"
        )
    if blocks * block_bytes > available_host_bytes():
        raise ConfigError(
            f"cache.host_gib is {host_gib}, and {available_host_bytes() / 2**30:.1f} GiB of memory are free: use less"
        )
    return blocks


def open_disk(config: EngineConfig, runner: Runner) -> DiskStore | None:
    """The store of the disk tier, if one is asked for. Raises ConfigError if it cannot be had."""
    if config.cache.disk_dir is None:
        return None
    from jserve.cache.disk_store import DiskStore

    return DiskStore.open(config.cache.disk_dir, runner.info.fingerprint, runner.block_bytes)
