"""The product with a weight, against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jserve.pallas_kernels import native
from jserve.pallas_kernels.backends import Backend
from jserve.pallas_kernels.matmul import matmul

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason=f"native backend: {native.unavailable()}")
BACKENDS = [pytest.param("native", marks=needs_native), "xla"]


def draw(rows: int, ins: int, outs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, ins)).astype(np.float32), rng.normal(size=(outs, ins)).astype(np.float32)


def product(x: np.ndarray, weight: np.ndarray, live: int | None = None, backend: Backend = "native") -> np.ndarray:
    count = jnp.int32(len(x) if live is None else live)
    return np.asarray(jax.jit(lambda x, w, n: matmul(x, w, jnp.float32, n, backend))(x, weight, count))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(1, 60), st.integers(0, 9))
def test_every_shape_is_the_product_in_float64_to_rounding(
    backend: Backend, rows: int, ins: int, outs: int, seed: int
) -> None:
    x, weight = draw(rows, ins, outs, seed)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    scale = np.abs(x).astype(np.float64) @ np.abs(weight.T).astype(np.float64)
    assert (np.abs(product(x, weight, backend=backend) - exact) <= 1e-6 * scale).all()


@needs_native
def test_weights_worth_several_threads_are_shared_out_whole() -> None:
    x, weight = draw(19, 576, 1537)
    np.testing.assert_allclose(product(x, weight), x.astype(np.float64) @ weight.T, rtol=1e-4, atol=1e-4)


@needs_native
def test_a_rows_bits_do_not_depend_on_its_batch_mates() -> None:
    x, weight = draw(300, 576, 200)
    alone = np.concatenate([product(x[i : i + 1], weight) for i in range(0, 300, 7)])
    for rows in (2, 3, 5, 8, 9, 64, 300):
        together = np.concatenate([product(x[i : i + rows], weight) for i in range(0, 300, rows)])
        np.testing.assert_array_equal(together[::7], alone)


@needs_native
@pytest.mark.parametrize("live", [0, 1, 7, 12])
def test_padding_is_not_computed_and_comes_out_as_zeros(live: int) -> None:
    x, weight = draw(12, 33, 50)
    whole = product(x, weight)
    x[live:] = np.nan
    some = product(x, weight, live)
    np.testing.assert_array_equal(some[:live], whole[:live])
    assert (some[live:] == 0).all()


@needs_native
def test_a_weight_of_another_width_is_refused_by_name() -> None:
    x, weight = draw(2, 16, 4)
    with pytest.raises(jax.errors.JaxRuntimeError, match="x has 16 columns, the weight 8"):
        product(x, weight[:, :8])


def test_other_types_go_to_xla_whatever_the_backend() -> None:
    x, weight = draw(3, 16, 4)
    half = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)
    y = matmul(*half, jnp.float32, jnp.int32(3), "native")
    np.testing.assert_allclose(y, x @ weight.T, rtol=0.05, atol=0.1)
