"""From logits to tokens, inside jit, each row by its own `SamplingParams`.

What a request asks for lives on the device in `SamplingState`, one row a slot, written once when it is admitted; a
step sends only slots and counts. The costly parts (penalties, random choice, log-probabilities) are behind
`lax.cond` on a flag for the whole batch, so that one program serves every mix and a greedy batch pays for argmax alone.
Top-k and top-p need no sort: the cut is found by bisection over the ordered bits of the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float32, Int32, UInt32

from jserve.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS, SamplingParams

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTS = 4  # top_k, seed (two words), min_tokens


class SamplingState(NamedTuple):
    """Device memory of the sampler, S slots by V tokens; donated and updated by every step."""

    last_token: Int32[Array, "S"]
    """The newest token of each slot, which may not have reached the host yet."""
    floats: Float32[Array, "S 6"]
    ints: Int32[Array, "S 4"]
    stop_ids: Int32[Array, "S 32"]
    bias_ids: Int32[Array, "S 300"]
    bias: Float32[Array, "S 300"]
    output_counts: Int32[Array, "S V"]
    prompt_seen: Bool[Array, "S V"]


class Sampled(NamedTuple):
    """What a step reads back. Log-probabilities are of the model's own distribution, before any penalty."""

    tokens: Int32[Array, "R"]
    logprob: Float32[Array, "R"]
    top_ids: Int32[Array, "R 20"]
    top_logprobs: Float32[Array, "R 20"]


class Flags(NamedTuple):
    """What any row of a batch needs."""

    adjust: bool
    random: bool
    logprobs: bool


def empty_state(slots: int, vocab_size: int) -> SamplingState:
    return SamplingState(
        last_token=jnp.zeros((slots,), jnp.int32),
        floats=jnp.zeros((slots, len(_FLOATS)), jnp.float32),
        ints=jnp.zeros((slots, _INTS), jnp.int32),
        stop_ids=jnp.full((slots, MAX_STOP_IDS), vocab_size, jnp.int32),
        bias_ids=jnp.full((slots, MAX_LOGIT_BIAS), vocab_size, jnp.int32),
        bias=jnp.zeros((slots, MAX_LOGIT_BIAS), jnp.float32),
        output_counts=jnp.zeros((slots, vocab_size), jnp.int32),
        prompt_seen=jnp.zeros((slots, vocab_size), jnp.bool_),
    )


def flags_of(params: SamplingParams) -> Flags:
    return Flags(
        adjust=needs_counts(params) or bool(params.logit_bias) or params.min_tokens > 0,
        random=params.temperature > 0,
        logprobs=params.logprobs is not None,
    )


def needs_counts(params: SamplingParams) -> bool:
    """Whether the tokens of prompt and earlier output matter to the request."""
    return params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)


# --- setting a slot up ----------------------------------------------------------------------------------------------


def pack_slot(slot: int, params: SamplingParams, stop_ids: frozenset[int], vocab_size: int) -> np.ndarray:
    """Everything that `set_slot` needs, as one vector of int32 words."""
    words = np.empty(1 + len(_FLOATS) + _INTS + MAX_STOP_IDS + 2 * MAX_LOGIT_BIAS, np.int32)
    words[0] = slot
    at = 1 + len(_FLOATS)
    words[1:at] = np.array([getattr(params, name) for name in _FLOATS], np.float32).view(np.int32)
    seed = (params.seed or 0) & (2**64 - 1)
    high, low = np.array([seed >> 32, seed & (2**32 - 1)], np.uint32).view(np.int32)
    words[at : at + _INTS] = (params.top_k, high, low, params.min_tokens)
    at += _INTS
    words[at : at + MAX_STOP_IDS + MAX_LOGIT_BIAS] = vocab_size  # out of range: dropped
    stops = sorted(stop_ids)
    words[at : at + len(stops)] = stops
    at += MAX_STOP_IDS
    words[at : at + len(params.logit_bias)] = list(params.logit_bias)
    at += MAX_LOGIT_BIAS
    bias = np.zeros(MAX_LOGIT_BIAS, np.float32)
    bias[: len(params.logit_bias)] = list(params.logit_bias.values())
    words[at:] = bias.view(np.int32)
    return words


def set_slot(state: SamplingState, words: Int32[Array, "words"]) -> SamplingState:
    """Write one slot's row from `pack_slot`'s words, and forget what the slot's last request has counted."""
    slot = words[0]
    sizes = (len(_FLOATS), _INTS, MAX_STOP_IDS, MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    ends = np.cumsum(sizes)
    floats, ints, stops, bias_ids, bias = (words[1 + end - n : 1 + end] for n, end in zip(sizes, ends, strict=True))
    return state._replace(
        floats=state.floats.at[slot].set(lax.bitcast_convert_type(floats, jnp.float32)),
        ints=state.ints.at[slot].set(ints),
        stop_ids=state.stop_ids.at[slot].set(stops),
        bias_ids=state.bias_ids.at[slot].set(bias_ids),
        bias=state.bias.at[slot].set(lax.bitcast_convert_type(bias, jnp.float32)),
        output_counts=state.output_counts.at[slot].set(0),
        prompt_seen=state.prompt_seen.at[slot].set(False),
    )


def count_tokens(prompt: list[int], output: list[int], vocab_size: int) -> np.ndarray:
    """What `set_counts` needs: how often each token is in the output, with the sign bit set if it is in the prompt."""
    words = np.bincount(output, minlength=vocab_size).astype(np.int32)
    words[np.array(prompt)] |= np.int32(-(2**31))
    return words


def set_counts(state: SamplingState, slot: Int32[Array, ""], words: Int32[Array, "V"]) -> SamplingState:
    """Write one slot's token counts, for requests with penalties (and their return after a preemption)."""
    return state._replace(
        output_counts=state.output_counts.at[slot].set(words & 0x7FFFFFFF),
        prompt_seen=state.prompt_seen.at[slot].set(words < 0),
    )


# --- choosing -------------------------------------------------------------------------------------------------------


def sample(
    logits: Float32[Array, "R V"],
    state: SamplingState,
    slots: Int32[Array, "R"],
    output_index: Int32[Array, "R"],
    flags: Int32[Array, "3"],
) -> tuple[Sampled, SamplingState]:
    """One token a row. `output_index` is how many output tokens the row has before this one.

    A padding row has a slot out of range: it computes something and changes nothing.
    """
    adjusted = lax.cond(flags[0] != 0, _adjust, lambda x, *_: x, logits, state, slots, output_index)
    greedy = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    tokens = lax.cond(flags[1] != 0, _choose, lambda *a: a[-1], adjusted, state, slots, output_index, greedy)
    logprobs = lax.cond(flags[2] != 0, _logprobs, _no_logprobs, logits, tokens)
    state = state._replace(
        last_token=state.last_token.at[slots].set(tokens, mode="drop"),
        output_counts=state.output_counts.at[slots, tokens].add(1, mode="drop"),
    )
    return Sampled(tokens, *logprobs), state


def _adjust(
    logits: Float32[Array, "R V"], state: SamplingState, slots: Int32[Array, "R"], output_index: Int32[Array, "R"]
) -> Float32[Array, "R V"]:
    """Penalties, logit bias, and no stop token before min_tokens."""
    row = jnp.arange(logits.shape[0])[:, None]
    repetition, presence, frequency = (state.floats[slots, i][:, None] for i in (3, 4, 5))
    counts = state.output_counts[slots]
    seen = state.prompt_seen[slots] | (counts > 0)
    penalised = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, penalised, logits)
    logits = logits - frequency * counts - presence * (counts > 0)
    logits = logits.at[row, state.bias_ids[slots]].add(state.bias[slots], mode="drop")
    too_early = (output_index < state.ints[slots, 3])[:, None]
    banned = jnp.where(too_early, state.stop_ids[slots], logits.shape[1])
    return logits.at[row, banned].set(-jnp.inf, mode="drop")


def _choose(
    logits: Float32[Array, "R V"],
    state: SamplingState,
    slots: Int32[Array, "R"],
    output_index: Int32[Array, "R"],
    greedy: Int32[Array, "R"],
) -> Int32[Array, "R"]:
    """A random token for each row with a temperature, by the Gumbel trick; `greedy` for the others.

    The noise is a function of the request's seed and of the token's place in its output, of nothing else.
    """
    temperature, top_p, min_p = (state.floats[slots, i] for i in (0, 1, 2))
    ints = state.ints[slots]
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    kept = _keep(scaled, ints[:, 0], top_p, min_p)
    keys = jax.vmap(_noise_key)(ints[:, 1], ints[:, 2], output_index)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (logits.shape[1],), jnp.float32))(keys)
    chosen = jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)
    return jnp.where(temperature > 0, chosen, greedy)


def _noise_key(seed_high: Int32[Array, ""], seed_low: Int32[Array, ""], index: Int32[Array, ""]) -> Array:
    data = lax.bitcast_convert_type(jnp.stack([seed_high, seed_low]), jnp.uint32)
    return jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), index)


def _keep(
    scaled: Float32[Array, "R V"], top_k: Int32[Array, "R"], top_p: Float32[Array, "R"], min_p: Float32[Array, "R"]
) -> Bool[Array, "R V"]:
    """Which tokens survive top-k, then top-p of what is left, then min-p. Ties at a cut stay together."""
    vocab_size = scaled.shape[1]
    order = _ordered_bits(scaled)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab_size), vocab_size)
    kept = order >= _cut(order, jnp.ones_like(scaled), k.astype(jnp.float32))
    relative = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
    mass = jnp.where(kept, relative, 0.0)
    nucleus = order >= _cut(order, mass, top_p * jnp.sum(mass, axis=-1))
    kept &= nucleus | (top_p >= 1.0)[:, None]
    # The best token stays whatever the cuts say, even if their targets vanish in float32.
    return (kept & (relative >= min_p[:, None])) | (relative >= 1.0)


def _ordered_bits(x: Float32[Array, "R V"]) -> UInt32[Array, "R V"]:
    """The floats as integers of the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _cut(
    order: UInt32[Array, "R V"], weight: Float32[Array, "R V"], target: Float32[Array, "R"]
) -> UInt32[Array, "R 1"]:
    """The largest cut at or above which a row's weights still reach its target; 0 if none does."""

    def narrow(i: Array, cut: UInt32[Array, "R 1"]) -> UInt32[Array, "R 1"]:
        trial = cut | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached = jnp.sum(jnp.where(order >= trial, weight, 0.0), axis=-1) >= target
        return jnp.where(reached[:, None], trial, cut)

    cut: Array = lax.fori_loop(0, 32, narrow, jnp.zeros((order.shape[0], 1), jnp.uint32))
    return cut


def _logprobs(
    logits: Float32[Array, "R V"], tokens: Int32[Array, "R"]
) -> tuple[Float32[Array, "R"], Int32[Array, "R k"], Float32[Array, "R k"]]:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, ids = lax.top_k(logprobs, MAX_LOGPROBS)
    return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0], ids.astype(jnp.int32), top


def _no_logprobs(
    logits: Float32[Array, "R V"], tokens: Int32[Array, "R"]
) -> tuple[Float32[Array, "R"], Int32[Array, "R k"], Float32[Array, "R k"]]:
    rows = logits.shape[0]
    none = jnp.zeros((rows, MAX_LOGPROBS), jnp.float32)
    return jnp.zeros((rows,), jnp.float32), none.astype(jnp.int32), none
