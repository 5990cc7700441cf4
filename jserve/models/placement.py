"""Where a model's parameters live: built as shapes, then put on the mesh leaf by leaf."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jserve.errors import ConfigError
from jserve.models.family import CausalLM
from jserve.models.layers import Fill
from jserve.models.registry import family_of
from jserve.models.spec import ModelSpec


def build(spec: ModelSpec, dtype: Any) -> CausalLM:
    """The model with shapes for parameters: no memory is taken."""
    return family_of(spec).build(spec, jnp.dtype(dtype))


def parameters(model: nnx.Module) -> dict[str, nnx.Param[Array]]:
    """Every parameter by its path, such as "layers.0.attention.qkv.weight"."""
    graph = nnx.iter_graph(model)
    return {".".join(map(str, path)): node for path, node in graph if isinstance(node, nnx.Param)}


def param_shardings(model: CausalLM, mesh: Mesh) -> dict[str, NamedSharding]:
    """How each parameter lies on the mesh. Raises ConfigError if the mesh cannot split the model."""
    check_tp(model.spec, mesh)
    return {
        path: NamedSharding(mesh, _fitting(param.out_sharding, param.shape, mesh))
        for path, param in parameters(model).items()
    }


def check_tp(spec: ModelSpec, mesh: Mesh) -> None:
    """A device holds whole KV heads and an equal part of the MLP."""
    tp = mesh.shape["tp"]
    for size, what in ((spec.num_kv_heads, "KV heads"), (spec.mlp_size, "MLP neurons")):
        if size % tp:
            raise ConfigError(f"tp is {tp}, and each layer has {size} {what}: choose a tp that divides them")


def _fitting(wanted: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Without the axes that do not divide their dimension: an odd vocabulary is kept whole on every device."""
    axes = (
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for axis, size in zip(wanted, shape, strict=False)
    )
    return PartitionSpec(*axes)


def init_random(spec: ModelSpec, mesh: Mesh, dtype: Any, seed: int = 0) -> CausalLM:
    """A model of random weights, drawn where they live: for benchmarks of shapes without a checkpoint."""
    model = build(spec, dtype)
    shardings = param_shardings(model, mesh)
    key = jax.random.key(seed)
    for i, (path, param) in enumerate(parameters(model).items()):
        param.set_value(_draw(jax.random.fold_in(key, i), param.shape, param.dtype, param.fill, shardings[path]))
    return model


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw(key: Array, shape: tuple[int, ...], dtype: Any, fill: Fill, sharding: NamedSharding) -> Array:
    if fill == "normal":
        value = jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)
    else:
        value = jnp.full(shape, 1 if fill == "ones" else 0, dtype)
    placed: Array = jax.lax.with_sharding_constraint(value, sharding)
    return placed
