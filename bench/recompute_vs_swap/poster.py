"""What the poster published (`published.json`), and the cost model of its machine from the fit that the file names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jserve.cache.cost import CostModel, DecodeCost, LinkCost, PrefillCost

FILE = Path(__file__).with_name("published.json")
BYTES = 2
"""Of a float16."""
NO_DISK = LinkCost(1.0)
"""The poster's machine has no disk tier: nothing reads this."""


@dataclass(frozen=True)
class Model:
    """What decides the costs of one model."""

    title: str
    num_params: float
    num_layers: int
    query_width: int
    """Heads times head dimension; so is `kv_width` of the KV heads."""
    kv_width: int

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.kv_width * BYTES


@cache
def published() -> Mapping[str, Any]:
    """The file as it is."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def model_named(name: str) -> Model:
    return Model(**published()["models"][name])


def cost_model(model: Model, block_tokens: int, *, pageable: bool = False) -> CostModel:
    """Times on the poster's A100, with blocks of so many tokens in pinned or pageable host memory.

    vLLM kept K and V of each layer apart, so that a block is 2 copies a layer: small blocks pay for many of them.
    """
    link = _link(model, block_tokens, pageable)
    return CostModel(
        prefill=_prefill(model),
        decode=_decode(model),
        host_to_device=link,
        device_to_host=link,
        disk_read=NO_DISK,
        disk_write=NO_DISK,
        block_tokens=block_tokens,
        block_bytes=block_tokens * model.kv_bytes_per_token,
    )


def _prefill(model: Model) -> PrefillCost:
    fit = published()["fit"]
    return PrefillCost.from_flops(
        model.num_params,
        model.num_layers,
        model.query_width,
        fit["flops_per_s"],
        linear_efficiency=fit["linear_efficiency"],
        attention_efficiency=fit["attention_efficiency"],
        overhead_s=fit["overhead_s"],
    )


def _decode(model: Model) -> DecodeCost:
    machine = published()["decode"]
    bytes_per_s = machine["hbm_bytes_per_s"] * machine["hbm_efficiency"]
    weights_s = model.num_params * BYTES / bytes_per_s
    return DecodeCost(weights_s, per_context_token_s=model.kv_bytes_per_token / bytes_per_s)


def _link(model: Model, block_tokens: int, pageable: bool) -> LinkCost:
    fit = published()["fit"]
    slower = _pageable_factor(fit["pageable_factor"], block_tokens) if pageable else 1.0
    copies = 2 * model.num_layers
    return LinkCost(fit["link_bytes_per_s"] / slower, copies * fit["link_per_copy_s"] * slower)


def _pageable_factor(ends: Mapping[str, float], block_tokens: int) -> float:
    (low, first), (high, last) = ((math.log2(int(tokens)), factor) for tokens, factor in ends.items())
    share = min(1.0, max(0.0, (math.log2(block_tokens) - low) / (high - low)))
    return first + share * (last - first)
