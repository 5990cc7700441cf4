"""Llama: Llama 2 and 3.x, YaRN-stretched Llamas, SmolLM2. Pre-norm, rotary positions, grouped queries, gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from jserve.errors import ModelError
from jserve.models import family
from jserve.models.family import CausalLM, Family, GgufLayout, Source
from jserve.models.layers import Attend, Attention, Embedding, GatedMLP, RMSNorm, Rotary, inverse_frequencies
from jserve.models.spec import Fields, ModelSpec, RopeSpec


def parse(fields: Fields) -> ModelSpec:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    max_position = fields.integer("max_position_embeddings", 2048)
    return ModelSpec(
        architecture="llama",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.head_dim(hidden, heads),
        mlp_size=fields.integer("intermediate_size"),
        max_position=max_position,
        activation=fields.activation("hidden_act", "silu"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        eos_token_ids=fields.eos_token_ids(),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        rope=fields.rope(max_position),
    )


class Layer(nnx.Module):
    def __init__(self, spec: ModelSpec, layer: int, dtype: Any) -> None:
        self.attention_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype)
        self.attention = Attention(spec, layer, dtype)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype)
        self.mlp = GatedMLP(spec, dtype)

    def __call__(self, x: Float[Array, "tokens hidden"], attend: Attend, rotary: Rotary) -> Array:
        x = x + self.attention(self.attention_norm(x), attend, rotary)
        return x + self.mlp(self.mlp_norm(x))


class Llama(CausalLM):
    def __init__(self, spec: ModelSpec, dtype: Any) -> None:
        self.spec = spec
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, dtype)
        self.layers = nnx.List([Layer(spec, i, dtype) for i in range(spec.num_layers)])
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype)
        self.head = None if spec.tie_embeddings else Embedding(spec.vocab_size, spec.hidden_size, dtype)

    def __call__(
        self, tokens: Int32[Array, "tokens"], positions: Int32[Array, "tokens"], attend: Attend
    ) -> Float[Array, "tokens hidden"]:
        assert self.spec.rope is not None
        rotary = Rotary.at(positions, self.spec.rope, self.spec.head_dim)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, attend, rotary)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "rows hidden"]) -> Float32[Array, "rows vocab"]:
        return (self.head or self.embedding).logits(hidden)


def sources(spec: ModelSpec) -> dict[str, Source]:
    found = {"embedding.weight": family.plain("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size)}
    found |= family.norm("norm", "model.norm", spec.hidden_size, bias=False)
    if not spec.tie_embeddings:
        found["head.weight"] = family.plain("lm_head.weight", spec.vocab_size, spec.hidden_size)
    for i in range(spec.num_layers):
        path, name = f"layers.{i}", f"model.layers.{i}"
        q, k, v, out = (f"{name}.self_attn.{part}_proj" for part in "qkvo")
        gate, up, down = (f"{name}.mlp.{part}_proj" for part in ("gate", "up", "down"))
        found |= family.norm(f"{path}.attention_norm", f"{name}.input_layernorm", spec.hidden_size, bias=False)
        found |= family.attention(f"{path}.attention", (q, k, v, out), spec)
        found |= family.norm(f"{path}.mlp_norm", f"{name}.post_attention_layernorm", spec.hidden_size, bias=False)
        found |= family.gated_mlp(f"{path}.mlp", (gate, up, down), spec)
    return found


# --- GGUF -----------------------------------------------------------------------------------------------------------

_Q, _K = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj"

_GGUF_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": _Q,
    "blk.{}.attn_k": _K,
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}

_GGUF_FIELDS = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "intermediate_size": "llama.feed_forward_length",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
}


def gguf_config(metadata: Mapping[str, Any], small: Mapping[str, np.ndarray]) -> dict[str, Any]:
    config = {ours: metadata[theirs] for ours, theirs in _GGUF_FIELDS.items() if theirs in metadata}
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    config["eos_token_id"] = sorted({end for end in ends if end is not None})
    rope = {"rope_type": "default", "rope_theta": metadata.get("llama.rope.freq_base", 10000.0)}
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": metadata.get("llama.rope.scaling.factor", 1.0)}
        original = metadata.get("llama.rope.scaling.original_context_length")
        rope |= {"original_max_position_embeddings": original} if original else {}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    config["rope_parameters"] = rope
    if "rope_freqs.weight" in small:
        config["rope_parameters"] = _llama3_rope(rope, small["rope_freqs.weight"])
    return config


def _llama3_rope(rope: dict[str, Any], divisors: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling, which GGUF keeps as each frequency's divisor: the factor is the largest of them."""
    factor, head_dim = float(divisors.max()), 2 * divisors.size
    low, high, original = 1.0, 4.0, 8192  # of every Llama 3.1, 3.2 and 3.3
    plain = RopeSpec(theta=rope["rope_theta"])
    scaled = RopeSpec("llama3", rope["rope_theta"], factor, original, low, high)
    expected = inverse_frequencies(plain, head_dim) / inverse_frequencies(scaled, head_dim)
    if not np.allclose(expected, divisors, rtol=1e-3):
        raise ModelError(
            "the GGUF tensor rope_freqs.weight is not Llama 3's RoPE scaling: use the model's safetensors, "
            "whose config.json says what it is"
        )
    return rope | {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


FAMILY = Family(
    parse=parse,
    build=Llama,
    sources=sources,
    ignored=("rotary_emb.inv_freq", "rope_freqs.weight"),
    gguf={
        "llama": GgufLayout(
            tensors=_GGUF_TENSORS,
            interleaved={_Q: "num_attention_heads", _K: "num_key_value_heads"},
            config=gguf_config,
        )
    },
)
