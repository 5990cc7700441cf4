"""Hardware and models as numbers, each with its source, and the cost model that follows from a pair of them.

The formulas are the usual rooflines: prefill by FLOPs, decode by bytes read, copies by bytes and a fixed part each
(reference: limits 6.1 to 6.4). `hardware.toml` and `models.toml` hold the numbers.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

from jserve.cache.cost import CostModel, DecodeCost, LinkCost, PrefillCost
from jserve.errors import ConfigError

ALIASES = {
    "a100-40gb": "a100-40gb-sxm",
    "a100-80gb": "a100-80gb-sxm",
    "a100": "a100-80gb-sxm",
    "h100": "h100-80gb-sxm",
    "h200": "h200-141gb-sxm",
    "cpu": "cpu-2core",
}


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its links: see `hardware.toml` for what each number is."""

    name: str
    title: str
    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    reserved_bytes: float
    linear_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    prefill_s_per_layer: float
    decode_s_per_layer: float
    link_bytes_per_s: float
    link_copy_s: float
    copies_beside_steps: bool
    peer_bytes_per_s: float
    peer_latency_s: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    disk_latency_s: float
    sources: Mapping[str, str]


@dataclass(frozen=True)
class ModelShape:
    """What costs depend on."""

    name: str
    title: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    context: int
    source: str

    def weight_bytes(self, bytes_per_number: int) -> float:
        return self.parameters * bytes_per_number

    def kv_bytes_per_token(self, bytes_per_number: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_number


def hardware(name: str) -> Hardware:
    """By name; ConfigError tells those that there are."""
    tables = _tables("hardware.toml")
    name = ALIASES.get(name, name)
    if name not in tables:
        raise ConfigError(_unknown("hardware", name, tables))
    table = _inherited(tables, name)
    numbers = {key: said["value"] for key, said in table.items() if isinstance(said, dict)}
    sources = {key: said["source"] for key, said in table.items() if isinstance(said, dict)}
    return Hardware(name=name, title=table["title"], **numbers, sources=sources)


def model_shape(name: str) -> ModelShape:
    """By name; ConfigError tells those that there are."""
    tables = _tables("models.toml")
    if name not in tables:
        raise ConfigError(_unknown("model profile", name, tables))
    return ModelShape(name=name, **tables[name])


def hardware_names() -> list[str]:
    return sorted(_tables("hardware.toml"))


def model_names() -> list[str]:
    return sorted(_tables("models.toml"))


def _inherited(tables: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = dict(tables[name])
    base = table.pop("base", None)
    return (_inherited(tables, base) if base else {}) | table


@cache
def _tables(file: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("jserve.simulation").joinpath(file).read_text())


def _unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"there is no {what} {name!r}: {hint}use one of {', '.join(sorted(known))}"


# --- what follows from them


def cost_model(
    gpu: Hardware,
    model: ModelShape,
    *,
    tp: int = 1,
    drives: int = 1,
    block_tokens: int = 16,
    bytes_per_number: int = 2,
) -> CostModel:
    """Times of steps and copies of this model on `tp` such devices, each with a link of its own to the host.

    `drives`: of the disk tier, striped.
    """
    kv_bytes = model.kv_bytes_per_token(bytes_per_number)
    # Two all-reduces a layer over the activations: each device sends and receives 2·(tp - 1)/tp of them.
    reduces = 2 * model.layers if tp > 1 else 0
    reduce_s_per_token = reduces * 2 * (tp - 1) / tp * model.hidden * bytes_per_number / gpu.peer_bytes_per_s
    reduces_s = reduces * gpu.peer_latency_s
    prefill = PrefillCost.from_flops(
        model.parameters,
        model.layers,
        model.heads * model.head_dim,
        gpu.flops_per_s * tp,
        linear_efficiency=gpu.linear_efficiency,
        attention_efficiency=gpu.attention_efficiency,
        overhead_s=gpu.prefill_s_per_layer * model.layers + reduces_s,
    )
    prefill.per_token_s += reduce_s_per_token
    read_bytes_per_s = gpu.memory_bytes_per_s * gpu.memory_efficiency * tp
    decode = DecodeCost(
        gpu.decode_s_per_layer * model.layers + reduces_s + model.weight_bytes(bytes_per_number) / read_bytes_per_s,
        reduce_s_per_token,
        kv_bytes / read_bytes_per_s,
    )
    link = gpu.link_bytes_per_s * tp
    return CostModel(
        prefill,
        decode,
        LinkCost(link, gpu.link_copy_s),
        LinkCost(link, gpu.link_copy_s),
        LinkCost(gpu.disk_read_bytes_per_s * drives, gpu.disk_latency_s),
        LinkCost(gpu.disk_write_bytes_per_s * drives, gpu.disk_latency_s),
        block_tokens,
        block_tokens * kv_bytes,
        copies_beside_steps=gpu.copies_beside_steps,
    )


def device_blocks(
    gpu: Hardware,
    model: ModelShape,
    *,
    tp: int = 1,
    block_tokens: int = 16,
    bytes_per_number: int = 2,
    memory_fraction: float = 0.9,
) -> int:
    """KV blocks that fit beside the weights; ConfigError, with the least tp that would do, if none does."""
    blocks = _device_blocks(gpu, model, tp, block_tokens, bytes_per_number, memory_fraction)
    if blocks < 1:
        fits = (n for n in (2, 4, 8, 16) if _device_blocks(gpu, model, n, block_tokens, bytes_per_number, 0.9) > 0)
        least = next(fits, None)
        weights = model.weight_bytes(bytes_per_number)
        raise ConfigError(
            f"{model.title} does not fit on {tp} x {gpu.title}: {weights / 1e9:.1f} GB of weights, and "
            f"{tp * memory_fraction * gpu.memory_bytes / 1e9:.1f} GB of memory"
            + (f": use --tp {least}" if least else ": use a larger GPU")
        )
    return blocks


def _device_blocks(
    gpu: Hardware, model: ModelShape, tp: int, block_tokens: int, bytes_per_number: int, memory_fraction: float
) -> int:
    free = tp * (gpu.memory_bytes * memory_fraction - gpu.reserved_bytes) - model.weight_bytes(bytes_per_number)
    return int(free // (block_tokens * model.kv_bytes_per_token(bytes_per_number)))


def describe(gpu: Hardware) -> list[str]:
    """Its numbers and where each comes from, a line each."""
    numbers = [f.name for f in fields(gpu) if f.name in gpu.sources]
    return [f"{name} = {getattr(gpu, name):.6g}  ({gpu.sources[name]})" for name in numbers]
