"""A GGUF file is the Hugging Face checkpoint that it was made from, whatever its types and row order."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from jax.sharding import AxisType, Mesh
from safetensors.numpy import load_file

from jserve import checkpoints
from jserve.checkpoints.gguf_file import GgufCheckpoint
from jserve.errors import ModelError
from jserve.models import RopeSpec, dense
from jserve.models.layers import inverse_frequencies

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
Q8_0, Q4_1, Q6_K = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q6_K

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{GGUF_NAMES[part]}.weight"
    return f"{GGUF_NAMES[stem]}.weight"


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's conversion orders the rows of Q and K: the two of each rotary pair side by side."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    variant: str = "llama2_gqa",
    kind: GGMLQuantizationType = F32,
    architecture: str = "llama",
    skip: str = "",
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """The fixture as llama.cpp would convert it: matrices in `kind`, vectors in float32."""
    config = json.loads((MODELS / variant / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_eos_token_id(2)
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    for name, tensor in load_file(MODELS / variant / "model.safetensors").items():
        if gguf_name(name) == skip:
            continue
        if "q_proj" in name or "k_proj" in name:
            tensor = interleave(tensor, heads if "q_proj" in name else kv_heads)
        used = kind if tensor.ndim == 2 else F32
        writer.add_tensor(gguf_name(name), quantize(np.ascontiguousarray(tensor), used), raw_dtype=used)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path: Path) -> checkpoints.LoadedModel:
    return checkpoints.load(path, Mesh(np.array(jax.devices()[:1]), ("tp",), axis_types=(AxisType.Auto,)), "float32")


@pytest.mark.parametrize("variant", ["llama2_gqa", "llama2_mha"])
def test_float32_is_the_model_that_it_was_made_from(tmp_path: Path, variant: str) -> None:
    loaded = load(write_gguf(tmp_path / "tiny.gguf", variant))
    with np.load(MODELS / variant / "golden.npz") as golden:
        prompt, wanted, greedy = (golden[f"{name}_1"] for name in ("prompt", "logits", "greedy"))
    found = dense.logits(loaded.model, prompt.tolist())[-len(wanted) :]
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)
    assert dense.greedy(loaded.model, prompt.tolist(), len(greedy)) == greedy.tolist()
    assert (loaded.name, loaded.spec.eos_token_ids) == ("tiny", (2,))


@pytest.mark.parametrize("kind", [F16, Q8_0, Q4_1], ids=lambda kind: kind.name)
def test_quantized_tensors_are_what_gguf_dequantizes(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "tiny.gguf", kind=kind))
    original = load_file(MODELS / "llama2_gqa" / "model.safetensors")
    assert set(checkpoint.shapes) == set(original)
    for name, tensor in original.items():
        expected = tensor
        if tensor.ndim == 2:
            expected = dequantize(quantize(tensor, kind), kind)  # row by row, so the order of rows does not matter
        np.testing.assert_array_equal(checkpoint.read(name), expected, err_msg=name)


def test_a_file_without_an_output_tensor_ties_its_embeddings(tmp_path: Path) -> None:
    assert load(write_gguf(tmp_path / "tiny.gguf", skip="output.weight")).spec.tie_embeddings


def test_llama_3_rope_scaling_is_recognised_from_its_divisors(tmp_path: Path) -> None:
    plain = RopeSpec(theta=500000.0)
    scaled = RopeSpec("llama3", 500000.0, 32.0, 8192, 1.0, 4.0)
    divisors = inverse_frequencies(plain, 16) / inverse_frequencies(scaled, 16)
    path = write_gguf(tmp_path / "tiny.gguf", "llama3", extra={"rope_freqs.weight": divisors})
    assert load(path).spec.rope == scaled
    path = write_gguf(tmp_path / "odd.gguf", "llama3", extra={"rope_freqs.weight": divisors[::-1].copy()})
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is not Llama 3's RoPE scaling"):
        load(path)


def test_a_missing_tensor_is_named_as_the_file_names_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", skip="blk.1.attn_k.weight")
    with pytest.raises(ModelError, match=r"tiny\.gguf has no tensor blk\.1\.attn_k\.weight"):
        load(path)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", extra={"blk.0.attn_q.bias": np.ones(32, np.float32)})
    with pytest.raises(ModelError, match=r"tensor blk\.0\.attn_q\.bias have no place"):
        load(path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", architecture="qwen2")
    with pytest.raises(ModelError, match=r"tiny\.gguf: GGUF architecture 'qwen2' is not supported: use llama"):
        load(path)


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 2000, -1000])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"tiny\.gguf cannot be read as GGUF, it may be cut short"):
        load(path)


def test_a_file_that_is_not_gguf_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ModelError, match=r"tiny\.gguf cannot be read as GGUF"):
        load(path)
