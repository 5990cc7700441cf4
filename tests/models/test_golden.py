"""Every supported variant computes what Hugging Face transformers computes: logits and greedy tokens.

The checkpoints and goldens are made by tests/fixtures/models/make.py.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jserve import checkpoints
from jserve.errors import ConfigError
from jserve.models import dense
from jserve.models.placement import parameters

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
VARIANTS = sorted(golden.parent.name for golden in MODELS.glob("*/golden.npz"))
SPLIT_IN_TWO = [name for name in VARIANTS if name != "smollm2"]  # its 3 KV heads do not divide


def load(variant: str, tp: int = 1, dtype: str = "float32") -> checkpoints.LoadedModel:
    mesh = Mesh(np.array(jax.devices()[:tp]), ("tp",), axis_types=(AxisType.Auto,))
    return checkpoints.load(MODELS / variant, mesh, dtype)


def golden(variant: str) -> dict[str, np.ndarray]:
    with np.load(MODELS / variant / "golden.npz") as arrays:
        return dict(arrays)


def test_every_variant_that_the_project_names_has_a_golden() -> None:
    assert VARIANTS == [
        "llama2_gqa",
        "llama2_mha",
        "llama3",
        "llama_linear",
        "llama_yarn",
        "opt",
        "opt_350m",
        "smollm2",
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant: str) -> None:
    model, expected = load(variant).model, golden(variant)
    for i in range(2):
        wanted = expected[f"logits_{i}"]
        found = dense.logits(model, expected[f"prompt_{i}"].tolist())[-len(wanted) :]
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_those_of_transformers(variant: str) -> None:
    model, expected = load(variant).model, golden(variant)
    for i in range(2):
        wanted = expected[f"greedy_{i}"].tolist()
        assert dense.greedy(model, expected[f"prompt_{i}"].tolist(), len(wanted)) == wanted


@pytest.mark.parametrize("variant", SPLIT_IN_TWO)
def test_two_devices_compute_what_one_does(variant: str) -> None:
    whole, split = load(variant).model, load(variant, tp=2).model
    prompt = golden(variant)["prompt_1"].tolist()
    np.testing.assert_allclose(dense.logits(split, prompt), dense.logits(whole, prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", SPLIT_IN_TWO)
def test_two_devices_hold_half_of_each_large_parameter(variant: str) -> None:
    split = ("qkv.weight", "qkv.bias", "attention.out.weight", "up.weight", "up.bias", "down.weight")
    for path, param in parameters(load(variant, tp=2).model).items():
        share = param[...].addressable_shards[0].data.size / param.size
        halved = path.endswith(split) or path in ("embedding.weight", "head.weight")
        assert share == (0.5 if halved else 1.0), path


def test_a_tp_that_does_not_divide_the_kv_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="tp is 2, and each layer has 3 KV heads"):
        load("smollm2", tp=2)


def test_bfloat16_stays_close_to_float32() -> None:
    prompt = golden("llama2_gqa")["prompt_0"].tolist()
    exact, rounded = (dense.logits(load("llama2_gqa", dtype=d).model, prompt) for d in ("float32", "bfloat16"))
    assert rounded.dtype == np.float32
    assert np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()
