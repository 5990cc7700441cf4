"""The sampler: each row by its own parameters, the same whatever else is in the batch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jserve.errors import InvalidRequest
from jserve.request import SamplingParams
from jserve.sampling import (
    Sampled,
    SamplingState,
    _keep,
    count_tokens,
    empty_state,
    flags_of,
    needs_counts,
    pack_slot,
    sample,
    set_counts,
    set_slot,
)

VOCAB, SLOTS = 64, 8
_sample = jax.jit(sample)
_set_slot, _set_counts, _jit_keep = jax.jit(set_slot), jax.jit(set_counts), jax.jit(_keep)


def state_for(
    requests: dict[int, SamplingParams],
    prompts: dict[int, list[int]] | None = None,
    outputs: dict[int, list[int]] | None = None,
    stop: frozenset[int] = frozenset(),
) -> SamplingState:
    state = empty_state(SLOTS, VOCAB)
    for slot, params in requests.items():
        state = _set_slot(state, pack_slot(slot, params, stop, VOCAB))
        if needs_counts(params):
            counts = count_tokens((prompts or {}).get(slot, [0]), (outputs or {}).get(slot, []), VOCAB)
            state = _set_counts(state, np.int32(slot), counts)
    return state


def run(
    logits: np.ndarray, state: SamplingState, requests: dict[int, SamplingParams], index: list[int] | None = None
) -> tuple[Sampled, SamplingState]:
    slots = np.array(list(requests), np.int32)
    flags = np.array([flags_of(p) for p in requests.values()]).any(axis=0).astype(np.int32)
    return _sample(jnp.asarray(logits), state, slots, np.array(index or [0] * len(slots), np.int32), flags)


def logits_for(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * 3


def test_greedy_takes_the_most_likely_token_and_remembers_it_by_slot() -> None:
    requests = {5: SamplingParams(), 2: SamplingParams()}
    logits = logits_for(2)
    sampled, state = run(logits, state_for(requests), requests)
    assert sampled.tokens.tolist() == logits.argmax(-1).tolist()
    assert state.last_token[np.array([5, 2])].tolist() == sampled.tokens.tolist()


def test_a_padding_row_changes_nothing() -> None:
    before = state_for({0: SamplingParams()})
    _, after = run(logits_for(1), before, {SLOTS: SamplingParams()})
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_same_seed_gives_the_same_tokens_whatever_the_batch_and_the_slot() -> None:
    params = SamplingParams(temperature=1.3, seed=1234567890123)
    row = logits_for(1)

    def tokens(requests: dict[int, SamplingParams], at: int) -> list[int]:
        logits = np.repeat(row, len(requests), axis=0)
        state = state_for(requests)
        return [int(run(logits, state, requests, [i] * len(requests))[0].tokens[at]) for i in range(12)]

    alone = tokens({3: params}, 0)
    others = {0: SamplingParams(), 1: SamplingParams(temperature=2.0, seed=9, presence_penalty=1.0), 6: params}
    assert tokens(others, 2) == alone
    assert len(set(alone)) > 3
    assert tokens({3: SamplingParams(temperature=1.3, seed=1234567890124)}, 0) != alone
    assert tokens({3: SamplingParams(temperature=1.3, seed=1234567890123 + 2**40)}, 0) != alone


def test_random_tokens_follow_the_softmax() -> None:
    logits = np.full((1, VOCAB), -30, np.float32)
    logits[0, :4] = np.log([0.5, 0.25, 0.15, 0.1]) * 0.7
    params = SamplingParams(temperature=0.7, seed=3)
    state = state_for({0: params})
    draw = jax.jit(jax.vmap(partial(sample), in_axes=(None, None, None, 0, None)))
    index = np.arange(4000, dtype=np.int32)[:, None]
    tokens = draw(jnp.asarray(logits), state, np.array([0], np.int32), index, np.array([0, 1, 0], np.int32))[0].tokens
    shares = np.bincount(np.asarray(tokens).ravel(), minlength=VOCAB)[:4] / 4000
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=0.03)


def kept_reference(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """By sorting, in float64; assumes no ties."""
    order = np.argsort(-scaled)
    keep = np.zeros(len(scaled), bool)
    keep[order[: top_k or len(scaled)]] = True
    p = np.where(keep, np.exp(scaled.astype(np.float64) - scaled.max()), 0)
    if top_p < 1:
        before = np.cumsum(p[order]) / p.sum() - p[order] / p.sum()
        keep[order[before >= top_p]] = False
    return keep & (np.exp(scaled.astype(np.float64) - scaled.max()) >= min_p)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
)
def test_the_cuts_are_those_of_a_full_sort(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    scaled = logits_for(1, seed)
    top_k = min(top_k, VOCAB)
    args = (np.array([v], t) for v, t in ((top_k, np.int32), (top_p, np.float32), (min_p, np.float32)))
    kept = np.asarray(_jit_keep(jnp.asarray(scaled), *args))[0]
    expected = kept_reference(scaled[0], top_k, float(np.float32(top_p)), float(np.float32(min_p)))
    differing = np.flatnonzero(kept != expected)
    # A token whose cumulated mass equals top_p to float32 precision may fall either way.
    assert len(differing) <= 1
    if len(differing):
        p = np.exp(scaled[0].astype(np.float64))
        mass = np.sort(p)[::-1].cumsum() / p.sum()
        assert np.abs(mass - top_p).min() < 1e-5 or top_k


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    requests = {0: SamplingParams(temperature=50.0, top_k=1, seed=1)}
    logits = logits_for(1)
    assert run(logits, state_for(requests), requests)[0].tokens[0] == logits.argmax()


def test_penalties_follow_their_formulas_and_count_prompt_and_output_apart() -> None:
    params = SamplingParams(repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3, logprobs=0)
    prompt, output = [1, 1, 2], [3, 3, 3, 4]
    logits = logits_for(1)
    expected = logits[0].copy()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    for token in set(output):
        expected[token] -= 0.3 * output.count(token) + 0.4
    # Raise the adjusted logits' own winner only just: the sampler must agree with the formula.
    for trial in range(VOCAB):
        probe = logits.copy()
        probe[0, trial] += 4
        target = expected.copy()
        if trial in {*prompt, *output}:
            raised = probe[0, trial]
            target[trial] = raised / 1.7 if raised > 0 else raised * 1.7
            if trial in output:
                target[trial] -= 0.3 * output.count(trial) + 0.4
        else:
            target[trial] = probe[0, trial]
        state = state_for({0: params}, {0: prompt}, {0: output})
        assert run(probe, state, {0: params})[0].tokens[0] == target.argmax()


def test_chosen_tokens_are_counted_for_the_next_step() -> None:
    params = SamplingParams(frequency_penalty=2.0)
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 7], logits[0, 8] = 3.0, 2.0
    state = state_for({0: params})
    tokens = []
    for _ in range(3):
        sampled, state = run(logits, state, {0: params})
        tokens.append(int(sampled.tokens[0]))
    assert tokens == [7, 8, 7]  # 3.0, then 2.0 against 1.0, then 1.0 against 0.0


def test_a_slot_forgets_its_last_request() -> None:
    first = SamplingParams(logit_bias={9: 100.0}, frequency_penalty=2.0)
    state = state_for({0: first})
    _, state = run(logits_for(1), state, {0: first})
    state = _set_slot(state, pack_slot(0, SamplingParams(), frozenset(), VOCAB))
    for a, b in zip(state._replace(last_token=jnp.zeros(SLOTS, jnp.int32)), empty_state(SLOTS, VOCAB), strict=True):
        expected = np.asarray(b).copy()
        if expected.shape == (SLOTS, 6):
            expected[0] = (0, 1, 0, 1, 0, 0)
        np.testing.assert_array_equal(a, expected)


def test_logit_bias_moves_a_token_of_its_own_row_only() -> None:
    requests = {0: SamplingParams(logit_bias={11: 100.0}), 1: SamplingParams(logit_bias={12: -100.0})}
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, 12] = 1
    tokens = run(logits, state_for(requests), requests)[0].tokens.tolist()
    assert tokens[0] == 11
    assert tokens[1] != 12


def test_stop_tokens_are_out_of_reach_before_min_tokens() -> None:
    params = SamplingParams(min_tokens=3)
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 5], logits[0, 6] = 9, 8
    state = state_for({0: params}, stop=frozenset([5]))
    assert [int(run(logits, state, {0: params}, [i])[0].tokens[0]) for i in range(5)] == [6, 6, 6, 5, 5]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    params = SamplingParams(logprobs=20, temperature=2.0, seed=1, logit_bias={0: 50.0})
    logits = logits_for(1)
    sampled, _ = run(logits, state_for({0: params}), {0: params})
    expected = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert sampled.tokens[0] == 0
    np.testing.assert_allclose(sampled.logprob[0], expected[0], rtol=1e-5)
    assert sampled.top_ids[0].tolist() == np.argsort(-logits[0])[:20].tolist()
    np.testing.assert_allclose(sampled.top_logprobs[0], np.sort(expected)[::-1][:20], rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", True), ("max_tokens", 0), ("min_tokens", -1), ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("top_p", float("nan")),
        ("min_p", -0.5), ("repetition_penalty", 0.0), ("presence_penalty", 3.0), ("frequency_penalty", float("nan")),
        ("seed", 2**63), ("logprobs", 21), ("logprobs", -1), ("logit_bias", {VOCAB: 1.0}), ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: float("nan")}), ("stop", ("",)), ("stop_token_ids", (VOCAB,)),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=field):
        SamplingParams(**{field: value}).check(VOCAB)


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens is 5, above max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4).check(VOCAB)
