"""A model is built without memory, at any size, and its parameters are drawn or placed where they live."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jserve.models import ModelSpec, build, dense, init_random, param_shardings, parameters, parse_config

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
LLAMA_2_70B = ModelSpec("llama", 32000, 8192, 80, 64, 8, 128, 28672, 4096, "silu", 1e-5, False)


def mesh(tp: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:tp]), ("tp",), axis_types=(AxisType.Auto,))


def spec_of(variant: str) -> ModelSpec:
    return parse_config(json.loads((MODELS / variant / "config.json").read_text()))


def test_a_70b_model_is_built_without_memory() -> None:
    leaves = parameters(build(LLAMA_2_70B, "bfloat16"))
    assert sum(int(np.prod(p.shape)) for p in leaves.values()) == 68_976_648_192
    assert leaves["layers.79.attention.qkv.weight"].shape == (8, 10, 128, 8192)
    assert leaves["layers.79.attention.out.weight"].shape == (8192, 64, 128)
    assert leaves["layers.79.mlp.gate_up.weight"].shape == (2, 28672, 8192)
    assert all(isinstance(p.get_raw_value(), jax.ShapeDtypeStruct) for p in leaves.values())


def test_weights_are_split_by_kv_head_mlp_and_vocabulary() -> None:
    shardings = param_shardings(build(LLAMA_2_70B, "bfloat16"), mesh(2))
    assert shardings["embedding.weight"].spec == P("tp")
    assert shardings["layers.0.attention.qkv.weight"].spec == P("tp")
    assert shardings["layers.0.attention.out.weight"].spec == P(None, "tp")
    assert shardings["layers.0.mlp.gate_up.weight"].spec == P(None, "tp")
    assert shardings["layers.0.mlp.down.weight"].spec == P(None, "tp")
    assert shardings["layers.0.mlp_norm.weight"].spec == P()


def test_an_odd_vocabulary_is_kept_whole_on_every_device() -> None:
    odd = ModelSpec("llama", 33, 32, 1, 4, 2, 8, 64, 64, "silu", 1e-5, True, rope=spec_of("llama2_gqa").rope)
    assert param_shardings(build(odd, "float32"), mesh(2))["embedding.weight"].spec == P(None)
    whole, split = (dense.logits(init_random(odd, mesh(tp), "float32", seed=1), [1, 2, 32]) for tp in (1, 2))
    assert whole.shape == (3, 33)
    np.testing.assert_allclose(split, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["llama3", "opt_350m"])
def test_a_random_model_runs_and_depends_on_its_seed_alone(variant: str) -> None:
    spec = spec_of(variant)
    first, same, other = (init_random(spec, mesh(1), "float32", seed) for seed in (0, 0, 1))
    outputs = [dense.logits(model, range(10)) for model in (first, same, other)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3
