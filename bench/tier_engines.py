"""Engines that differ in their cache alone: one runner, and so the very same compiled programs, under each in turn.

A cache may use fewer blocks than the runner's pool has. An engine made here is dropped, never closed: closing it would
free the runner's memory.
"""

from __future__ import annotations

from dataclasses import replace

from bench.shapes import SHAPES
from jserve.cache.cost import CostModel, restore_strategy
from jserve.cache.hierarchy import TieredCache
from jserve.cache.host_tier import HostTier
from jserve.cache.kv_cache import KVCache
from jserve.config import EngineConfig
from jserve.engine import Engine
from jserve.models.placement import init_random
from jserve.models.registry import parse_config
from jserve.progress import Progress
from jserve.runner import Runner, make_mesh, resolve_dtype
from jserve.transfer import JaxTransfer


def make_runner(config: EngineConfig, shape: str | None, progress: Progress) -> Runner:
    """Of a model, or of a shape with random weights."""
    if shape is None:
        return Runner.from_config(config, progress)
    mesh = make_mesh(config.tp)
    spec = parse_config(SHAPES[shape], shape)
    model = init_random(spec, mesh, resolve_dtype(config.dtype, mesh))
    return Runner(config, model, spec, f"{shape} (random weights)", mesh, progress)


def plain_engine(config: EngineConfig, runner: Runner, device_blocks: int) -> Engine:
    """The device pool alone."""
    info = replace(runner.info, device_blocks=device_blocks)
    return Engine(config, info, runner, cache=KVCache(device_blocks, info.block_size))


def tiered_engine(
    config: EngineConfig, runner: Runner, device_blocks: int, host_blocks: int, cost: CostModel
) -> Engine:
    """With a host tier, from which everything that it has is loaded."""
    info = replace(runner.info, device_blocks=device_blocks)
    cache = TieredCache(
        device_blocks,
        info.block_size,
        JaxTransfer(runner),
        HostTier(host_blocks),
        None,
        cost=cost,
        strategy=restore_strategy("always"),
        staging_blocks=0,
    )
    return Engine(config, info, runner, cache=cache)


def finish(engine: Engine, request_ids: list[str]) -> None:
    """End these requests, and every copy."""
    for request_id in request_ids:
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
