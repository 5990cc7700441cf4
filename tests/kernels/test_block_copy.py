"""Blocks leave the cache and come back as they were, whatever the backend, and in place."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jserve.pallas_kernels import native
from jserve.pallas_kernels.backends import Backend
from jserve.pallas_kernels.block_copy import gather_blocks, scatter_blocks

LAYERS, BLOCKS = 17, 11  # more pages than a program of the kernel loads at once
PAGE = (4, 2, 24)
BACKENDS: list[Backend] = ["xla", "pallas", *(["native"] if native.unavailable() is None else [])]  # type: ignore[list-item]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def pool(page: tuple[int, ...] = PAGE, dtype: Any = jnp.float32, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """K and V: every element has its own value, as far as the dtype can tell."""
    values = np.random.default_rng(seed).permutation(2 * LAYERS * BLOCKS * int(np.prod(page)))
    pages = jnp.asarray(values.reshape(2, LAYERS, BLOCKS, *page)).astype(dtype)
    return list(pages[0]), list(pages[1])


def expected_buffer(k: list[Any], v: list[Any], ids: list[int]) -> np.ndarray:
    return np.stack([[(np.asarray(a)[i], np.asarray(b)[i]) for a, b in zip(k, v, strict=True)] for i in ids])


@pytest.mark.gpu
@pytest.mark.parametrize("ids", [[3], [0, 1, 2, 3], [10, 0, 7, 2, 5], [4, 4, 4]])
def test_gathered_blocks_are_those_of_every_layer_in_the_order_asked_for(backend: Backend, ids: list[int]) -> None:
    k, v = pool()
    buffer = jax.jit(partial(gather_blocks, backend=backend))(k, v, jnp.array(ids, jnp.int32))
    assert buffer.shape == (len(ids), LAYERS, 2, *PAGE)
    np.testing.assert_array_equal(buffer, expected_buffer(k, v, ids))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("page", "dtype"),
    [
        (PAGE, jnp.bfloat16),
        ((16, 3, 80), jnp.float16),
        ((4, 1, 2048), jnp.bfloat16),  # more than one tile, the last one partly filled or not
        ((5, 3, 300), jnp.float32),
        ((16, 2, 64), jnp.int8),
        ((16, 2, 64), jnp.float8_e4m3fn),
        ((3,), jnp.float32),  # the scales of quantised pages
    ],
)
def test_a_round_trip_changes_no_bit(backend: Backend, page: tuple[int, ...], dtype: Any) -> None:
    k, v = pool(page, dtype)
    other_k, other_v = pool(page, dtype, seed=1)
    there, back = [1, 8, 3, 0], [9, 2, 10, 4]
    buffer = jax.jit(partial(gather_blocks, backend=backend))(k, v, jnp.array(there, jnp.int32))
    new_k, new_v = jax.jit(partial(scatter_blocks, backend=backend))(
        other_k, other_v, jnp.array(back, jnp.int32), buffer
    )
    for before, target, after in zip(k + v, other_k + other_v, new_k + new_v, strict=True):
        want = bytes_of(target)
        want[back] = bytes_of(before)[there]
        np.testing.assert_array_equal(bytes_of(after), want)


def bytes_of(pages: Any) -> np.ndarray:
    array = np.array(pages)
    return array.view(np.uint8).reshape(BLOCKS, -1)


@pytest.mark.gpu
def test_padding_is_anything_when_gathered_and_dropped_when_scattered(backend: Backend) -> None:
    k, v = pool()
    ids = jnp.array([6, BLOCKS, 2**31 - 1, -1], jnp.int32)
    buffer = jax.jit(partial(gather_blocks, backend=backend))(k, v, ids)
    np.testing.assert_array_equal(buffer[:1], expected_buffer(k, v, [6]))
    new_k, new_v = jax.jit(partial(scatter_blocks, backend=backend))(k, v, ids, buffer + 1)
    for before, after in zip(k + v, new_k + new_v, strict=True):
        want = np.array(before)
        want[6] += 1
        np.testing.assert_array_equal(after, want)


def test_a_donated_cache_is_written_in_place(backend: Backend) -> None:
    if backend == "pallas" and jax.default_backend() == "cpu":
        pytest.skip("interpreted kernels copy; bench.a100 checks the compiled ones")
    page = jax.ShapeDtypeStruct((100 * BLOCKS, *PAGE), jnp.float32)
    pages = [page] * LAYERS
    ids = jax.ShapeDtypeStruct((4,), jnp.int32)
    buffer = jax.ShapeDtypeStruct((4, LAYERS, 2, *PAGE), jnp.float32)
    program = jax.jit(partial(scatter_blocks, backend=backend), donate_argnums=(0, 1))
    memory = program.lower(pages, pages, ids, buffer).compile().memory_analysis()
    page_bytes = page.size * page.dtype.itemsize
    assert memory.alias_size_in_bytes == 2 * LAYERS * page_bytes
    assert memory.temp_size_in_bytes < page_bytes


def test_each_device_copies_its_own_heads(backend: Backend) -> None:
    """tp=2: under plain jit XLA partitions by itself; a kernel runs inside shard_map."""
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",), axis_types=(AxisType.Auto,))
    pages, blocks = P(None, None, "tp"), P(None, None, None, None, "tp")
    k, v = (jax.device_put(x, NamedSharding(mesh, pages)) for x in pool())
    ids = jax.device_put(jnp.array([5, 1], jnp.int32), NamedSharding(mesh, P()))
    gather, scatter = partial(gather_blocks, backend=backend), partial(scatter_blocks, backend=backend)
    if backend != "xla":
        gather = jax.shard_map(gather, mesh=mesh, in_specs=(pages, pages, P()), out_specs=blocks, check_vma=False)
        scatter = jax.shard_map(
            scatter, mesh=mesh, in_specs=(pages, pages, P(), blocks), out_specs=(pages, pages), check_vma=False
        )
    compiled = jax.jit(gather).lower(k, v, ids).compile()
    buffer = compiled(k, v, ids)
    assert buffer.sharding.is_equivalent_to(NamedSharding(mesh, blocks), buffer.ndim)
    assert "all-" not in compiled.as_text()
    np.testing.assert_array_equal(buffer, expected_buffer(k, v, [5, 1]))
    new_k, _ = jax.jit(scatter)(k, v, ids + 2, buffer)
    assert new_k[0].sharding.is_equivalent_to(NamedSharding(mesh, pages), new_k[0].ndim)
    np.testing.assert_array_equal(np.asarray(new_k[1])[[7, 3]], np.asarray(k[1])[[5, 1]])


def test_pages_and_buffers_that_do_not_fit_are_refused(backend: Backend) -> None:
    k, v = pool()
    ids = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="must be alike"):
        gather_blocks(k, v[:-1], ids, backend=backend)
    with pytest.raises(ValueError, match=r"\(1, 17, 2, 4, 2, 24\)"):
        scatter_blocks(k, v, ids, jnp.zeros((1, LAYERS, 2, *PAGE)), backend=backend)
    with pytest.raises(ValueError, match="float16"):
        scatter_blocks(k, v, ids, jnp.zeros((2, LAYERS, 2, *PAGE), jnp.float16), backend=backend)


def test_codes_that_a_kernel_could_not_address_are_refused(backend: Backend) -> None:
    if backend != "pallas":
        pytest.skip("XLA addresses everything")
    page = jax.ShapeDtypeStruct((1 << 16, 16, 16, 128), jnp.int8)
    with pytest.raises(ValueError, match="fewer blocks"):
        jax.eval_shape(partial(gather_blocks, backend=backend), [page], [page], jax.ShapeDtypeStruct((1,), jnp.int32))
