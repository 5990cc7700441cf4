"""The model families that jserve serves, one line each.

A new family is one file here and one line in `FAMILIES`, under the `model_type` of its config.json. The file ends in a
`Family` of:

- `parse(fields) -> ModelSpec`, from config.json through `Fields`, which makes the errors. Whatever would change the
  output and is not supported must be refused (`Fields.refuse`), never ignored.
- `build(spec, dtype) -> CausalLM`, made of `jserve.models.layers`. Parameters come from `layers.parameter`: shapes
  without memory, each with its PartitionSpec over the mesh axis `tp`. Layers are an `nnx.List`, unrolled; layer i calls
  `attend(i, q, k, v)` exactly once, with rotated q and k, and does the rest of the block itself. Nothing in a model
  depends on caches, batches or the number of devices, and each token's result depends on other tokens only through
  `attend`.
- `sources(spec) -> {parameter path: Source}`, for every parameter: the Hugging Face tensors that it is made of.
- optionally `ignored` tensors, and a `gguf` layout.

To test one, add a tiny variant to tests/fixtures/models/make.py: the golden tests take it from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jserve.errors import ModelError
from jserve.models import llama, opt
from jserve.models.family import Family
from jserve.models.spec import Fields, ModelSpec

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "opt": opt.FAMILY,
}


def family_of(spec: ModelSpec) -> Family:
    return FAMILIES[spec.architecture]


def parse_config(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """The spec that a Hugging Face config.json describes; `where` names it in errors."""
    fields = Fields(config, where)
    architecture = fields.text("model_type")
    if architecture not in FAMILIES:
        raise ModelError(f"{where}: model_type {architecture!r} is not supported: use one of {', '.join(FAMILIES)}")
    if fields.has("quantization_config"):
        raise ModelError(f"{where}: quantized weights (quantization_config) are not supported: use the original model")
    return FAMILIES[architecture].parse(fields)
