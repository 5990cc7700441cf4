"""What a model is, in numbers: the frozen description that every family is built from.

A family's file reads one from a Hugging Face config.json with the `Fields` reader here, which turns everything that is
missing, malformed or not supported into a ModelError naming it. Holds no arrays and imports no JAX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from jserve.errors import ModelError

RopeKind = Literal["default", "linear", "llama3", "yarn"]
Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding and how it is stretched beyond the context it was trained for."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    """How many times longer the context is made; 1 for "default"."""
    original_max_position: int = 0
    """The context of pre-training ("llama3" and "yarn")."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """"llama3": wavelengths above original / low are stretched, those below original / high are not."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """"yarn": dimensions of more than `beta_fast` rotations are kept, of fewer than `beta_slow` are stretched."""
    truncate: bool = True
    """"yarn": round the bounds of that ramp to whole dimensions."""
    attention_factor: float = 1.0
    """"yarn": scales queries and keys alike (YaRN, section 3.4: the attention temperature)."""


@dataclass(frozen=True)
class ModelSpec:
    """One model. What a family does not have keeps its default."""

    architecture: str
    """`model_type` of config.json: the family's name in the registry."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_position: int
    """Tokens of the longest context."""
    activation: Activation
    norm_eps: float
    tie_embeddings: bool
    """The embedding is also the output head."""
    eos_token_ids: tuple[int, ...] = ()
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: RopeSpec | None = None
    """None: positions are learned."""
    pre_norm: bool = True
    """Normalise before attention and MLP; else after their residual sums (OPT-350M)."""
    final_norm: bool = True
    embed_size: int = 0
    """Width of the embedding; 0, or the hidden size, means no projection between the two (OPT-350M has one)."""

    def __post_init__(self) -> None:
        if not self.embed_size:
            object.__setattr__(self, "embed_size", self.hidden_size)
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"the model has {self.num_heads} query heads and {self.num_kv_heads} KV heads: "
                "the first must be a multiple of the second"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


class Fields:
    """A config.json being read: typed access to its fields, with errors that name field and value."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self.where = where

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, "a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
            raise self.error(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def section(self, name: str) -> Fields | None:
        """A nested object, None if absent or null."""
        value = self._config.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, "an object")
        return Fields(value, f"{self.where}: {name}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._config.get(name) is not None

    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id`: one id, several, or none."""
        value = self._config.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error("eos_token_id", "a token id or a list of token ids")
        return tuple(ids)

    def activation(self, name: str, default: str) -> Activation:
        value = self.text(name, default)
        if value not in _ACTIVATIONS:
            raise self.error(name, f"one of the supported activations: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def head_dim(self, hidden_size: int, num_heads: int) -> int:
        """`head_dim` as given, else what the heads make of the hidden size."""
        if self.has("head_dim"):
            return self.integer("head_dim")
        if hidden_size % num_heads:
            raise ModelError(
                f"{self.where}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, "
                "and there is no head_dim"
            )
        return hidden_size // num_heads

    def refuse(self, name: str, allowed: Any, reason: str) -> None:
        """Raise if the field is there with another value than the allowed one."""
        if self.has(name) and self._config[name] != allowed:
            raise ModelError(f"{self.where}: {name} is {self._config[name]!r}: {reason}")

    def rope(self, max_position: int) -> RopeSpec:
        """RoPE as transformers 5 writes it (`rope_parameters`) or as older ones do (`rope_theta`, `rope_scaling`)."""
        parameters = self.section("rope_parameters") or self.section("rope_scaling") or Fields({}, self.where)
        theta = parameters if parameters.has("rope_theta") else self
        for fields in (self, parameters):
            fields.refuse("partial_rotary_factor", 1.0, "rotating a part of each head is not supported")
        kind = parameters.text("rope_type", parameters.text("type", "default"))
        if kind not in get_args(RopeKind):
            raise ModelError(
                f"{parameters.where}: rope type {kind!r} is not supported: use one of {', '.join(get_args(RopeKind))}"
            )
        original = self if self.has("original_max_position_embeddings") else parameters
        return _rope(
            parameters,
            cast(RopeKind, kind),
            theta.number("rope_theta", 10000.0),
            original.integer("original_max_position_embeddings", max_position),
            max_position,
        )

    def error(self, name: str, expected: str) -> ModelError:
        if name not in self._config:
            return ModelError(f"{self.where}: {name} is missing: it must be {expected}")
        return ModelError(f"{self.where}: {name} is {self._config[name]!r}: it must be {expected}")

    def _value(self, name: str, default: Any) -> Any:
        value = self._config.get(name)
        return default if value is None else value


def _rope(fields: Fields, kind: RopeKind, theta: float, original: int, max_position: int) -> RopeSpec:
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(kind, theta, fields.number("factor"))
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if low >= high:
            raise ModelError(f"{fields.where}: low_freq_factor is {low:g}: it must be below high_freq_factor {high:g}")
        return RopeSpec(kind, theta, fields.number("factor"), original, low, high)
    factor = fields.number("factor", max_position / original)
    return RopeSpec(
        kind,
        theta,
        factor,
        original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        truncate=fields.flag("truncate", True),
        attention_factor=_yarn_attention_factor(fields, factor),
    )


def _yarn_attention_factor(fields: Fields, factor: float) -> float:
    """As given, else 0.1 ln(factor) + 1 (YaRN, equation 22), or DeepSeek's ratio of two such terms."""
    if fields.has("attention_factor"):
        return fields.number("attention_factor")

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if fields.has("mscale") and fields.has("mscale_all_dim"):
        return scale(fields.number("mscale")) / scale(fields.number("mscale_all_dim"))
    return scale(1.0)
