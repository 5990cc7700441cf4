"""OPT (Zhang et al., 2022), 125M to 66B: learned positions, biases, plain MLP; post-norms and projections in 350M."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Float32, Int32

from jserve.models import family
from jserve.models.family import CausalLM, Family, Source
from jserve.models.layers import MLP, Attend, Attention, Embedding, LayerNorm, Linear
from jserve.models.spec import Fields, ModelSpec

POSITION_OFFSET = 2
"""The first rows of the position table are for padding, which jserve does not have."""


def parse(fields: Fields) -> ModelSpec:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.refuse("layer_norm_elementwise_affine", True, "layer norms without parameters are not supported")
    biased = fields.flag("enable_bias", True)
    pre_norm = fields.flag("do_layer_norm_before", True)
    return ModelSpec(
        architecture="opt",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.head_dim(hidden, heads),
        mlp_size=fields.integer("ffn_dim"),
        max_position=fields.integer("max_position_embeddings", 2048),
        activation=fields.activation("activation_function", "relu"),
        norm_eps=1e-5,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        eos_token_ids=fields.eos_token_ids(),
        attention_bias=biased,
        mlp_bias=biased,
        pre_norm=pre_norm,
        final_norm=pre_norm and not fields.flag("_remove_final_layer_norm", False),
        embed_size=fields.integer("word_embed_proj_dim", hidden),
    )


class Layer(nnx.Module):
    def __init__(self, spec: ModelSpec, layer: int, dtype: Any) -> None:
        self.pre_norm = spec.pre_norm
        self.attention_norm = LayerNorm(spec.hidden_size, spec.norm_eps, dtype)
        self.attention = Attention(spec, layer, dtype)
        self.mlp_norm = LayerNorm(spec.hidden_size, spec.norm_eps, dtype)
        self.mlp = MLP(spec, dtype)

    def __call__(self, x: Float[Array, "tokens hidden"], attend: Attend) -> Float[Array, "tokens hidden"]:
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x), attend, None)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, attend, None))
        return self.mlp_norm(x + self.mlp(x))


class OPT(CausalLM):
    def __init__(self, spec: ModelSpec, dtype: Any) -> None:
        self.spec = spec
        hidden, embed = spec.hidden_size, spec.embed_size
        projected = embed != hidden
        self.embedding = Embedding(spec.vocab_size, embed, dtype)
        self.positions = Embedding(spec.max_position + POSITION_OFFSET, hidden, dtype, split=P())
        self.project_in = Linear((hidden,), (embed,), dtype, split=P()) if projected else None
        self.layers = nnx.List([Layer(spec, i, dtype) for i in range(spec.num_layers)])
        self.norm = LayerNorm(hidden, spec.norm_eps, dtype) if spec.final_norm else None
        self.project_out = Linear((embed,), (hidden,), dtype, split=P()) if projected else None
        self.head = None if spec.tie_embeddings else Embedding(spec.vocab_size, embed, dtype)

    def __call__(
        self, tokens: Int32[Array, "tokens"], positions: Int32[Array, "tokens"], attend: Attend
    ) -> Float[Array, "tokens hidden"]:
        x = self.embedding(tokens)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.positions(positions + POSITION_OFFSET)
        for layer in self.layers:
            x = layer(x, attend)
        return x if self.norm is None else self.norm(x)

    def logits(self, hidden: Float[Array, "rows hidden"]) -> Float32[Array, "rows vocab"]:
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return (self.head or self.embedding).logits(hidden)


def sources(spec: ModelSpec) -> dict[str, Source]:
    root, hidden, embed = "model.decoder", spec.hidden_size, spec.embed_size
    found = {
        "embedding.weight": family.plain(f"{root}.embed_tokens.weight", spec.vocab_size, embed),
        "positions.weight": family.plain(f"{root}.embed_positions.weight", spec.max_position + POSITION_OFFSET, hidden),
    }
    if embed != hidden:
        found |= family.linear("project_in", f"{root}.project_in", hidden, embed, bias=False)
        found |= family.linear("project_out", f"{root}.project_out", embed, hidden, bias=False)
    if spec.final_norm:
        found |= family.norm("norm", f"{root}.final_layer_norm", hidden, bias=True)
    if not spec.tie_embeddings:
        found["head.weight"] = family.plain("lm_head.weight", spec.vocab_size, embed)
    for i in range(spec.num_layers):
        path, name = f"layers.{i}", f"{root}.layers.{i}"
        q, k, v, out = (f"{name}.self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
        found |= family.norm(f"{path}.attention_norm", f"{name}.self_attn_layer_norm", hidden, bias=True)
        found |= family.attention(f"{path}.attention", (q, k, v, out), spec)
        found |= family.norm(f"{path}.mlp_norm", f"{name}.final_layer_norm", hidden, bias=True)
        found |= family.linear(f"{path}.mlp.up", f"{name}.fc1", spec.mlp_size, hidden, bias=spec.mlp_bias)
        found |= family.linear(f"{path}.mlp.down", f"{name}.fc2", hidden, spec.mlp_size, bias=spec.mlp_bias)
    return found


FAMILY = Family(parse=parse, build=OPT, sources=sources, ignored=("decoder.version",))
