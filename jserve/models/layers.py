"""The layers that every family is made of: linear, norms, embedding, rotary positions, attention, MLP.

Layout, chosen for speed: a weight is stored [out..., in...] and contracted on its last dimensions, and what reads the
same input is one weight. Each parameter starts as a shape without memory and carries its PartitionSpec over the mesh
axis `tp`: attention is split by KV head, the MLP by its inner size, embeddings by vocabulary.

Computation is in the parameters' dtype; norm statistics, rotary angles and logits are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float32, Int32

from jserve.models.spec import Activation, ModelSpec, RopeSpec
from jserve.pallas_kernels.matmul import plain_matmul

Fill = Literal["normal", "ones", "zeros"]

BY_VOCABULARY = P("tp")


class Attend(Protocol):
    """Attention as the caller does it: a paged cache when serving, a plain causal mask in a test.

    The queries and keys are already rotated; the scale head_dim ** -0.5 is the caller's to apply.
    """

    def __call__(
        self,
        layer: int,
        q: Float[Array, "tokens heads head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads head_dim"],
    ) -> Float[Array, "tokens heads head_dim"]: ...


class Matmul(Protocol):
    """x · weightᵀ, in `dtype`."""

    def __call__(
        self, x: Float[Array, "rows ins"], weight: Float[Array, "outs ins"], dtype: Any
    ) -> Float[Array, "rows outs"]: ...


def parameter(shape: tuple[int, ...], dtype: Any, split: P, fill: Fill = "normal") -> nnx.Param[Array]:
    """A parameter without memory. `fill` is what it holds when it is drawn at random for a benchmark."""
    nothing_yet = cast(Array, jax.ShapeDtypeStruct(shape, dtype))
    # eager_sharding=False: NNX would put the value on the ambient mesh, and here there is no value.
    return nnx.Param(nothing_yet, out_sharding=split, eager_sharding=False, fill=fill)


class Linear(nnx.Module):
    """y[..., outs] = x[..., ins] · weight[outs, ins] + bias[outs], over any number of dimensions."""

    def __init__(
        self, outs: tuple[int, ...], ins: tuple[int, ...], dtype: Any, *, split: P, bias: bool = False
    ) -> None:
        self.contracted = len(ins)
        self.weight = parameter((*outs, *ins), dtype, split)
        self.bias = parameter(outs, dtype, P(*split[: len(outs)]), "zeros") if bias else None
        self.matmul: Matmul = plain_matmul

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = contract(x, self.weight[...], self.contracted, x.dtype, self.matmul)
        return y if self.bias is None else y + self.bias[...]


def contract(
    x: Float[Array, "rows ..."], weight: Float[Array, "..."], dims: int, dtype: Any, on_cpu: Matmul = plain_matmul
) -> Float[Array, "rows ..."]:
    """Sum over the last `dims` dimensions of both. A CPU does it as one product of plain matrices, `on_cpu`."""
    flat = partial(_contract_flat, dims=dims, dtype=dtype, matmul=on_cpu)
    y: Array = jax.lax.platform_dependent(x, weight, cpu=flat, default=partial(_contract, dims=dims, dtype=dtype))
    return y


def _contract(x: Array, weight: Array, dims: int, dtype: Any) -> Array:
    # The weight is on the left: XLA wants there what is contracted on its last dimension, and would first copy a
    # weight of more than two dimensions that it met on the right.
    axes = tuple(range(weight.ndim - dims, weight.ndim)), tuple(range(x.ndim - dims, x.ndim))
    return jnp.moveaxis(jax.lax.dot_general(weight, x, (axes, ((), ())), preferred_element_type=dtype), -1, 0)


def _contract_flat(x: Array, weight: Array, dims: int, dtype: Any, matmul: Matmul) -> Array:
    rows, outs = x.shape[0], weight.shape[: weight.ndim - dims]
    y = matmul(x.reshape(rows, -1), weight.reshape(math.prod(outs), -1), dtype)
    return jnp.reshape(y, (rows, *outs))


def use_matmul(model: nnx.Module, matmul: Matmul) -> None:
    """Have every product with a weight of the model done by `matmul`, where the model runs on a CPU."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear | Embedding):
            module.matmul = matmul


class RMSNorm(nnx.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float, dtype: Any) -> None:
        self.eps = eps
        self.weight = parameter((size,), dtype, P(), "ones")

    def __call__(self, x: Float[Array, "tokens size"]) -> Float[Array, "tokens size"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with weight and bias (Ba et al., 2016)."""

    def __init__(self, size: int, eps: float, dtype: Any) -> None:
        self.eps = eps
        self.weight = parameter((size,), dtype, P(), "ones")
        self.bias = parameter((size,), dtype, P(), "zeros")

    def __call__(self, x: Float[Array, "tokens size"]) -> Float[Array, "tokens size"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        normed = centred * scale * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return normed.astype(x.dtype)


class Embedding(nnx.Module):
    """A vector for each token. When embeddings are tied it is the output head too."""

    def __init__(self, vocab_size: int, size: int, dtype: Any, *, split: P = BY_VOCABULARY) -> None:
        self.weight = parameter((vocab_size, size), dtype, split)
        self.matmul: Matmul = plain_matmul

    def __call__(self, ids: Int32[Array, "tokens"]) -> Float[Array, "tokens size"]:
        return self.weight[...].at[ids].get(mode="clip")

    def logits(self, hidden: Float[Array, "rows size"]) -> Float32[Array, "rows vocab"]:
        return contract(hidden, self.weight[...], 1, jnp.float32, self.matmul)


# --- rotary positions ---------------------------------------------------------------------------------------------


class Rotary(NamedTuple):
    """The rotation of each token (Su et al., 2021), for heads stored as two halves. Made once a step."""

    cos: Float32[Array, "tokens 1 half"]
    sin: Float32[Array, "tokens 1 half"]

    @classmethod
    def at(cls, positions: Int32[Array, "tokens"], rope: RopeSpec, head_dim: int) -> Rotary:
        angles = positions[:, None, None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
        return cls(jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor)

    def __call__(self, x: Float[Array, "tokens heads head_dim"]) -> Float[Array, "tokens heads head_dim"]:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> np.ndarray:
    """Radians a position for each pair of dimensions, float32 [head_dim / 2]."""
    theta = np.float32(rope.theta)
    plain = np.float32(1) / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    keep = _kept_share(rope, plain, head_dim).astype(np.float32)
    blend: np.ndarray = plain / np.float32(rope.factor) * (1 - keep) + plain * keep
    return blend


def _kept_share(rope: RopeSpec, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """For each frequency: 1 keeps it, 0 divides it by the factor, between the two is a blend."""
    if rope.kind == "llama3":  # by wavelength, as Llama 3.1 was trained
        turns = rope.original_max_position * plain / (2 * np.pi)
        ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return np.asarray(np.clip(ramp, 0, 1))
    if rope.kind == "yarn":  # by parts (YaRN, section 3.2): a ramp over the dimension's index
        low, high = (_yarn_dimension(rope, turns, head_dim) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        past = (np.arange(head_dim // 2) - low) / max(high - low, 0.001)
        return np.asarray(1 - np.clip(past, 0, 1))
    return np.zeros_like(plain)


def _yarn_dimension(rope: RopeSpec, turns: float, head_dim: int) -> float:
    """The (fractional) index of the frequency that makes so many turns in the original context."""
    return head_dim * float(np.log(rope.original_max_position / (turns * 2 * np.pi))) / (2 * float(np.log(rope.theta)))


# --- blocks ---------------------------------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023) around the caller's `attend`.

    qkv holds, for each KV head, its group of query heads, then its key head, then its value head.
    """

    def __init__(self, spec: ModelSpec, layer: int, dtype: Any) -> None:
        self.layer, self.group = layer, spec.group_size
        outs = spec.num_kv_heads, spec.group_size + 2, spec.head_dim
        self.qkv = Linear(outs, (spec.hidden_size,), dtype, split=P("tp"), bias=spec.attention_bias)
        ins = spec.num_heads, spec.head_dim
        self.out = Linear((spec.hidden_size,), ins, dtype, split=P(None, "tp"), bias=spec.attention_bias)

    def __call__(
        self, x: Float[Array, "tokens hidden"], attend: Attend, rotary: Rotary | None
    ) -> Float[Array, "tokens hidden"]:
        qkv = self.qkv(x)
        tokens, kv_heads, _, head_dim = qkv.shape
        q = qkv[:, :, : self.group].reshape(tokens, kv_heads * self.group, head_dim)
        k, v = qkv[:, :, self.group], qkv[:, :, self.group + 1]
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        return self.out(attend(self.layer, q, k, v))


_ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class MLP(nnx.Module):
    """down(activation(up(x)))."""

    def __init__(self, spec: ModelSpec, dtype: Any) -> None:
        self.activation = spec.activation
        self.up = Linear((spec.mlp_size,), (spec.hidden_size,), dtype, split=P("tp"), bias=spec.mlp_bias)
        self.down = Linear((spec.hidden_size,), (spec.mlp_size,), dtype, split=P(None, "tp"), bias=spec.mlp_bias)

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
        return self.down(_ACTIVATIONS[self.activation](self.up(x)))


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer, 2020), gate and up as one weight [2, mlp, hidden]."""

    def __init__(self, spec: ModelSpec, dtype: Any) -> None:
        self.activation = spec.activation
        outs = 2, spec.mlp_size
        self.gate_up = Linear(outs, (spec.hidden_size,), dtype, split=P(None, "tp"), bias=spec.mlp_bias)
        self.down = Linear((spec.hidden_size,), (spec.mlp_size,), dtype, split=P(None, "tp"), bias=spec.mlp_bias)

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
        both = self.gate_up(x)
        return self.down(_ACTIVATIONS[self.activation](both[:, 0]) * both[:, 1])
