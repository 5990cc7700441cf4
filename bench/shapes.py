"""The shapes of well-known models, for benchmarks with random weights: what their config.json would say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA_2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048}


def _llama_2(hidden: int, layers: int, heads: int, mlp: int, kv_heads: int | None = None) -> dict[str, Any]:
    return _LLAMA_2 | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "intermediate_size": mlp,
    }


def _opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return _OPT | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": hidden,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": _llama_2(256, 4, 8, 688),
    # Much to compute for a token and little KV, so that loading wins even on a small CPU.
    "wide": _llama_2(1024, 2, 8, 4096, kv_heads=2) | {"vocab_size": 4096},
    "llama-2-7b": _llama_2(4096, 32, 32, 11008),
    # As the recompute-or-swap poster's Yarn-Llama-2-7B-64k, whose positions reach further.
    "llama-2-7b-64k": _llama_2(4096, 32, 32, 11008) | {"max_position_embeddings": 65536},
    "llama-2-13b": _llama_2(5120, 40, 40, 13824),
    "llama-2-70b": _llama_2(8192, 80, 64, 28672, kv_heads=8),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
}
