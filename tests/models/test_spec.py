"""config.json becomes a ModelSpec, in the words of transformers 4 and 5 alike; the unsupported is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jserve.errors import ModelError
from jserve.models import ModelSpec, RopeSpec, parse_config
from jserve.models.layers import inverse_frequencies

MODELS = Path(__file__).parent.parent / "fixtures" / "models"

LLAMA_2_70B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 4096,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "rope_scaling": None,
}
OPT_66B = {
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "ffn_dim": 36864,
    "hidden_size": 9216,
    "max_position_embeddings": 2048,
    "num_attention_heads": 72,
    "num_hidden_layers": 64,
    "vocab_size": 50272,
    "word_embed_proj_dim": 9216,
    "eos_token_id": 2,
}


def fixture(variant: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODELS / variant / "config.json").read_text())
    return config


def test_llama_2_70b_shares_each_kv_head_among_eight_query_heads() -> None:
    spec = parse_config(LLAMA_2_70B)
    assert spec == ModelSpec(
        architecture="llama",
        vocab_size=32000,
        hidden_size=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        mlp_size=28672,
        max_position=4096,
        activation="silu",
        norm_eps=1e-5,
        tie_embeddings=False,
        eos_token_ids=(2,),
        rope=RopeSpec(theta=10000.0),
    )
    assert spec.group_size == 8


def test_opt_66b_has_biases_and_learned_positions() -> None:
    spec = parse_config(OPT_66B)
    assert (spec.rope, spec.attention_bias, spec.mlp_bias, spec.tie_embeddings) == (None, True, True, True)
    assert (spec.pre_norm, spec.final_norm, spec.embed_size) == (True, True, 9216)


def test_opt_350m_normalises_after_each_block_and_projects_its_embeddings() -> None:
    spec = parse_config(fixture("opt_350m"))
    assert (spec.pre_norm, spec.final_norm, spec.embed_size, spec.hidden_size) == (False, False, 16, 32)


@pytest.mark.parametrize("variant", ["llama2_gqa", "llama3", "llama_yarn"])
def test_transformers_5_rope_parameters_say_the_same_as_rope_scaling(variant: str) -> None:
    old = fixture(variant)
    scaling = old.pop("rope_scaling") or {}
    kind = scaling.pop("type", None) or scaling.pop("rope_type", "default")
    new = {k: v for k, v in old.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": kind, "rope_theta": old.get("rope_theta", 10000.0), **scaling}
    assert parse_config(new) == parse_config(fixture(variant))


def test_yarn_llama_2_7b_64k_sharpens_attention_by_its_factor() -> None:
    yarn = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True}
    spec = parse_config(LLAMA_2_70B | {"rope_scaling": yarn, "max_position_embeddings": 65536})
    assert spec.rope is not None
    assert (spec.rope.kind, spec.rope.factor, spec.rope.original_max_position) == ("yarn", 16.0, 4096)
    assert spec.rope.attention_factor == pytest.approx(0.1 * math.log(16) + 1)


def test_rope_scaling_keeps_fast_dimensions_and_stretches_slow_ones() -> None:
    plain = inverse_frequencies(RopeSpec(theta=500000.0), 128)
    for kind in ("llama3", "yarn"):
        scaled = inverse_frequencies(RopeSpec(kind, 500000.0, 8.0, original_max_position=8192), 128)
        np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
        np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)
        assert np.all(np.diff(scaled) < 0)


def test_several_end_of_sequence_tokens_are_kept() -> None:
    assert parse_config(fixture("llama3")).eos_token_ids == (2, 3)
    assert parse_config(LLAMA_2_70B | {"eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported: use one of llama, opt"),
        ({"model_type": None}, "model_type is None: it must be a string"),
        ({"hidden_act": "xielu"}, "hidden_act is 'xielu': it must be one of the supported activations: silu"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported: use one of default, lin"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing: it must be a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear': it must be an object"),
        ({"rope_scaling": {"type": "yarn", "factor": float("nan")}}, "factor is nan: it must be a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: rotating a part of each head is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized weights .* are not supported"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: it must be a positive whole number"),
        ({"vocab_size": "32000"}, "vocab_size is '32000': it must be a positive whole number"),
        ({"num_key_value_heads": 7}, "64 query heads and 7 KV heads"),
        ({"num_attention_heads": 63, "num_key_value_heads": 63}, "hidden_size 8192 is not a multiple of"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>': it must be a token id or a list of token ids"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no': it must be true or false"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_config(LLAMA_2_70B | change)


def test_a_missing_field_is_named() -> None:
    config = {k: v for k, v in LLAMA_2_70B.items() if k != "hidden_size"}
    with pytest.raises(ModelError, match=r"config\.json: hidden_size is missing: it must be a positive whole number"):
        parse_config(config)
