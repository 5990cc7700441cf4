"""KV write: each token's KV lands in its slot, padding nowhere, and a donated cache is not copied."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.pallas_kernels import Backend, kv_write, native

pytestmark = pytest.mark.gpu

BACKENDS: tuple[Backend, ...] = ("native", "xla", "pallas")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    if chosen == "native" and (problem := native.unavailable()):
        pytest.skip(f"native backend: {problem}")
    return chosen


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_tokens_land_in_their_slots_and_padding_is_dropped(backend: Backend, tokens: int, dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(tokens)
    blocks, size, heads, dim = 20, 16, 3, 8
    before = rng.normal(size=(2, blocks, size, heads, dim)).astype(dtype)
    new = rng.normal(size=(2, tokens, heads, dim)).astype(dtype)
    slot = rng.permutation(blocks * size)[:tokens].astype(np.int32)
    slot[::3] = [blocks * size, 2**31 - 1, -1][tokens % 3]
    expected = before.copy()
    for t in np.flatnonzero((slot >= 0) & (slot < blocks * size)):
        expected[:, slot[t] // size, slot[t] % size] = new[:, t]
    write = jax.jit(functools.partial(kv_write, backend=backend))
    np.testing.assert_array_equal(np.stack(write(*map(jnp.asarray, (*before, *new, slot)))), expected)


def test_a_donated_cache_is_written_in_place_across_layers(backend: Backend) -> None:
    layers, shape = 4, (2048, 16, 2, 16)
    caches = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(layers)]
    addresses = [[x.unsafe_buffer_pointer() for x in pair] for pair in caches]
    kv = jnp.ones((8, 2, 16))
    slot = jnp.arange(8, dtype=jnp.int32) * 100

    @functools.partial(jax.jit, donate_argnums=0)
    def step(caches: list[tuple[jax.Array, jax.Array]]) -> list[tuple[jax.Array, jax.Array]]:
        return [kv_write(k, v, kv, kv, slot, backend=backend) for k, v in caches]

    memory = step.lower(caches).compile().memory_analysis()
    pool_bytes = 2 * layers * int(np.prod(shape)) * 4
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / layers / 2
    written = step(caches)
    assert [[x.unsafe_buffer_pointer() for x in pair] for pair in written] == addresses
    assert all(float(x.sum()) == kv.size for pair in written for x in pair)


def test_a_cache_that_is_not_donated_keeps_its_content(backend: Backend) -> None:
    cache = jnp.zeros((4, 4, 1, 8))
    written, _ = jax.jit(functools.partial(kv_write, backend=backend))(
        cache, cache, jnp.ones((1, 1, 8)), jnp.ones((1, 1, 8)), jnp.zeros(1, jnp.int32)
    )
    assert float(cache.sum()) == 0
    assert float(written.sum()) == 8


def test_shapes_that_do_not_fit_are_refused(backend: Backend) -> None:
    cache, kv = jnp.zeros((4, 4, 1, 8)), jnp.ones((1, 2, 8))
    with pytest.raises(ValueError, match="do not fit a cache"):
        kv_write(cache, cache, kv, kv, jnp.zeros(1, jnp.int32), backend=backend)
