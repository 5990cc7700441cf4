"""What a model family is: how to describe, build and fill its models. Each family's file ends in one `Family`.

Checkpoints are seen as Hugging Face writes them: a config.json and tensors by name. A `Source` says which tensors a
parameter is made of, and how; the helpers below are the layouts of `jserve.models.layers`, written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from jserve.models.layers import Attend
from jserve.models.spec import Fields, ModelSpec

Shape = tuple[int, ...]


class CausalLM(nnx.Module):
    """A language model over a flat batch of tokens. It knows nothing of caches, requests or meshes."""

    spec: ModelSpec

    def __call__(
        self, tokens: Int32[Array, "tokens"], positions: Int32[Array, "tokens"], attend: Attend
    ) -> Float[Array, "tokens hidden"]:
        """The hidden state of each token, after the final norm."""
        raise NotImplementedError

    def logits(self, hidden: Float[Array, "rows hidden"]) -> Float32[Array, "rows vocab"]:
        raise NotImplementedError


@dataclass(frozen=True)
class Source:
    """One parameter: the checkpoint tensors it is made of, with the shapes they must have, and how."""

    tensors: tuple[tuple[str, Shape], ...]
    combine: Callable[..., np.ndarray] = lambda tensor: tensor


@dataclass(frozen=True)
class GgufLayout:
    """How a family is written in GGUF, translated to Hugging Face's names."""

    tensors: Mapping[str, str]
    """GGUF name to Hugging Face name, without `.weight`; `{}` stands for the layer's number."""
    interleaved: Mapping[str, str]
    """Hugging Face names (as above) whose rows are stored rotary-interleaved, to the config field of their heads."""
    config: Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], dict[str, Any]]
    """From the metadata and the small float tensors outside layers, what config.json would say."""


@dataclass(frozen=True)
class Family:
    """See `jserve.models.registry` for the contract."""

    parse: Callable[[Fields], ModelSpec]
    build: Callable[[ModelSpec, Any], CausalLM]
    sources: Callable[[ModelSpec], dict[str, Source]]
    ignored: tuple[str, ...] = ()
    """Endings of tensor names that checkpoints may hold and the model does not use."""
    gguf: Mapping[str, GgufLayout] = field(default_factory=dict)
    """By `general.architecture`."""


def plain(name: str, *shape: int) -> Source:
    """The tensor as it is."""
    return Source(((name, shape),))


def norm(path: str, name: str, size: int, *, bias: bool) -> dict[str, Source]:
    parts = ("weight", "bias") if bias else ("weight",)
    return {f"{path}.{part}": plain(f"{name}.{part}", size) for part in parts}


def linear(path: str, name: str, outs: int, ins: int, *, bias: bool) -> dict[str, Source]:
    found = {f"{path}.weight": plain(f"{name}.weight", outs, ins)}
    if bias:
        found[f"{path}.bias"] = plain(f"{name}.bias", outs)
    return found


def attention(path: str, names: tuple[str, str, str, str], spec: ModelSpec) -> dict[str, Source]:
    """`Attention` from the tensors of its query, key, value and output projections."""
    q, k, v, out = names
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def fuse(*parts: np.ndarray) -> np.ndarray:
        by_head = [x.reshape(spec.num_kv_heads, -1, spec.head_dim, *x.shape[1:]) for x in parts]
        return np.concatenate(by_head, axis=1)

    def fused(part: str, *ins: int) -> Source:
        shapes = (q_size, *ins), (kv_size, *ins), (kv_size, *ins)
        return Source(tuple((f"{n}.{part}", s) for n, s in zip((q, k, v), shapes, strict=True)), fuse)

    def by_head(weight: np.ndarray) -> np.ndarray:
        return weight.reshape(spec.hidden_size, spec.num_heads, spec.head_dim)

    found = {
        f"{path}.qkv.weight": fused("weight", spec.hidden_size),
        f"{path}.out.weight": Source(((f"{out}.weight", (spec.hidden_size, q_size)),), by_head),
    }
    if spec.attention_bias:
        found[f"{path}.qkv.bias"] = fused("bias")
        found[f"{path}.out.bias"] = plain(f"{out}.bias", spec.hidden_size)
    return found


def gated_mlp(path: str, names: tuple[str, str, str], spec: ModelSpec) -> dict[str, Source]:
    """`GatedMLP` from the tensors of its gate, up and down projections."""
    gate, up, down = names

    def stack(*parts: np.ndarray) -> np.ndarray:
        return np.stack(parts)

    def both(part: str, *ins: int) -> Source:
        return Source(tuple((f"{n}.{part}", (spec.mlp_size, *ins)) for n in (gate, up)), stack)

    found = {f"{path}.gate_up.weight": both("weight", spec.hidden_size)}
    if spec.mlp_bias:
        found[f"{path}.gate_up.bias"] = both("bias")
    return found | linear(f"{path}.down", down, spec.hidden_size, spec.mlp_size, bias=spec.mlp_bias)
