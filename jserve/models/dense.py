"""The plainest way to run a model: the whole sequence at once, no cache. The reference that tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32, Int32

from jserve.models.family import CausalLM


def causal_attend(
    layer: int,
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
) -> Float[Array, "tokens heads head_dim"]:
    """Each token sees itself and all before it. Softmax in float32."""
    del layer
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("qhgd,khd->hgqk", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    seen = jnp.tril(jnp.ones((tokens, tokens), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("hgqk,khd->qhgd", weights, v).reshape(tokens, heads, head_dim)


def logits(model: CausalLM, tokens: Sequence[int]) -> Float32[np.ndarray, "tokens vocab"]:
    """After each of the tokens."""
    graph, state = nnx.split(model)
    return np.asarray(_logits(graph, state, jnp.asarray(tokens, jnp.int32)))


def greedy(model: CausalLM, prompt: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens, each the most likely one. Every step recomputes everything."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        padding = [0] * (len(prompt) + count - len(ids))  # one shape, one compilation; nobody sees what comes later
        ids.append(int(logits(model, ids + padding)[len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@partial(jax.jit, static_argnums=0)
def _logits(graph: Any, state: Any, tokens: Int32[Array, "tokens"]) -> Float32[Array, "tokens vocab"]:
    model: CausalLM = nnx.merge(graph, state)
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    return model.logits(model(tokens, positions, causal_attend))
