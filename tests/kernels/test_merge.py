"""Merging partial attention: equal to float64, whatever an empty holder's output is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.pallas_kernels import Backend, merge_partials

pytestmark = pytest.mark.gpu

BACKENDS: tuple[Backend, ...] = ("xla", "pallas")
Shape = tuple[int, int, int, int]


def exact_merge(out: np.ndarray, lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    merged, total = np.zeros(out.shape[1:]), np.full(lse.shape[1:], -np.inf)
    for token, head in np.ndindex(total.shape):
        full = np.flatnonzero(lse[:, token, head] > -np.inf)
        if len(full):
            of = lse[full, token, head].astype(np.float64)
            weights = np.exp(of - of.max())
            merged[token, head] = weights @ out[full, token, head].astype(np.float64) / weights.sum()
            total[token, head] = of.max() + np.log(weights.sum())
    return merged, total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 2, 3, 8), (4, 5, 3, 80), (3, 7, 2, 128)], ids=str)
def test_partials_merge_exactly_and_empty_holders_take_no_part(shape: Shape, backend: Backend) -> None:
    rng = np.random.default_rng(0)
    out = rng.normal(size=shape).astype(np.float32)
    lse = rng.normal(size=shape[:3], scale=30).astype(np.float32)
    empty = rng.random(lse.shape) < 0.3
    empty[:, 0, 0] = True
    lse[empty] = -np.inf
    out[empty] = rng.choice([np.nan, np.inf, 1e38], size=(empty.sum(), 1))
    merge = jax.jit(functools.partial(merge_partials, backend=backend))
    merged, total = merge(jnp.asarray(out), jnp.asarray(lse))
    expected, expected_total = exact_merge(out, lse)
    np.testing.assert_allclose(merged, expected, atol=2e-6, rtol=0)
    np.testing.assert_allclose(total, expected_total, atol=1e-6, rtol=1e-6)
    assert not merged[0, 0].any()
    assert total[0, 0] == -np.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_has_the_dtype_of_the_parts(backend: Backend) -> None:
    out = jnp.ones((2, 1, 1, 64), jnp.bfloat16)
    merged, total = merge_partials(out, jnp.zeros((2, 1, 1)), backend=backend)
    assert merged.dtype == jnp.bfloat16
    assert (merged == 1).all()
    assert float(total[0, 0]) == pytest.approx(np.log(2))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"need lse of \(2, 1, 1\) in float32"):
        merge_partials(jnp.ones((2, 1, 1, 8)), jnp.zeros((2, 1)), backend="xla")
