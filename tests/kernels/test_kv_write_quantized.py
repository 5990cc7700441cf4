"""The write into a quantised cache: what it holds is the definition's, bit for bit, however a block was filled."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jserve.errors import ConfigError
from jserve.pallas_kernels import Backend, BatchMetadata, KVScales, kv_write_quantized

pytestmark = pytest.mark.gpu

BACKENDS: tuple[Backend, ...] = ("xla", "pallas")
CODES = (jnp.int8, jnp.float8_e4m3fn)
LARGEST = {jnp.int8: 127.0, jnp.float8_e4m3fn: 448.0}
BLOCKS, SIZE, HEADS, DIM = 12, 4, 2, 24
ROWS, TOKENS, WIDTH = 3, 12, 4
Cache = tuple[np.ndarray, np.ndarray, KVScales]


def empty_cache(codes: jnp.dtype) -> Cache:
    """What was there before must not matter: codes of any bits, NaN scales."""
    rng = np.random.default_rng(9)
    pages = rng.integers(0, 256, (2, BLOCKS, SIZE, HEADS, DIM), np.uint8).view(codes)
    scales = np.full((2, BLOCKS, HEADS), np.nan, np.float32)
    return pages[0], pages[1], KVScales(scales[0], scales[1])


def metadata(queries: list[int], history: list[int], table: np.ndarray) -> BatchMetadata:
    slot = np.full(TOKENS, BLOCKS * SIZE, np.int32)
    start = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    for row, n in enumerate(queries):
        position = history[row] + np.arange(n)
        slot[start[row] : start[row] + n] = table[row, position // SIZE] * SIZE + position % SIZE
    context = np.array([h + n if n else 0 for h, n in zip(history, queries, strict=True)], np.int32)
    return BatchMetadata(*map(jnp.asarray, (start, context, table, slot)))


@functools.partial(jax.jit, static_argnames="backend", compiler_options={"xla_backend_optimization_level": 0})
def _compiled(k: jax.Array, v: jax.Array, scales: KVScales, new: jax.Array, meta: BatchMetadata, backend: Backend):  # type: ignore[no-untyped-def]
    return kv_write_quantized(k, v, scales, new[0], new[1], meta, backend=backend)


def write(cache: Cache, new: np.ndarray, meta: BatchMetadata, backend: Backend) -> Cache:
    k, v, scales = _compiled(*jax.tree.map(jnp.asarray, cache), jnp.asarray(new), meta, backend=backend)
    return np.asarray(k), np.asarray(v), KVScales(*map(np.asarray, scales))


def reference_write(codes: np.ndarray, scale: np.ndarray, new: np.ndarray, meta: BatchMetadata) -> None:
    """In place, by the definition, in float64: block by block, head by head."""
    dtype = codes.dtype.type
    limit = LARGEST[jnp.int8] if codes.dtype == np.int8 else LARGEST[jnp.float8_e4m3fn]
    slots = np.asarray(meta.kv_slot)

    def rounded(x: np.ndarray) -> np.ndarray:
        return np.rint(x).astype(np.int8) if codes.dtype == np.int8 else x.astype(np.float32).astype(dtype)

    for block in np.unique(slots[slots < BLOCKS * SIZE] // SIZE):
        tokens = np.flatnonzero(slots // SIZE == block)
        first = slots[tokens].min() % SIZE
        for head in range(HEADS):
            x = new[tokens, head].astype(np.float64)
            exponent = np.ceil(np.log2(np.abs(x).max() / limit)) if x.any() else -100
            grown = 2.0 ** max(exponent, -100)
            if first > 0:
                old = float(scale[block, head])
                grown = max(old, grown)
                held = codes[block, :first, head].astype(np.float64) * old
                codes[block, :first, head] = rounded(held / grown)
            codes[block, slots[tokens] % SIZE, head] = rounded(x / grown)
            scale[block, head] = grown


def assert_same(cache: Cache, expected: Cache) -> None:
    for got, wanted in zip(cache[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))
    for got, wanted in zip(cache[2], expected[2], strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codes", CODES, ids=["int8", "e4m3"])
def test_a_cache_holds_what_the_definition_says_after_any_steps(codes: jnp.dtype, backend: Backend) -> None:
    """Rows of any chunks, decodes among them, whose magnitudes change from step to step; nothing else is touched."""

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(
        steps=st.lists(st.lists(st.integers(0, 4), min_size=ROWS, max_size=ROWS), min_size=1, max_size=5),
        seed=st.integers(0, 2**31),
    )
    def check(steps: list[list[int]], seed: int) -> None:
        rng = np.random.default_rng(seed)
        table = rng.permutation(BLOCKS).reshape(ROWS, WIDTH).astype(np.int32)
        cache = empty_cache(codes)
        expected = (np.array(cache[0]), np.array(cache[1]), KVScales(*map(np.array, cache[2])))
        history = [0] * ROWS
        for queries in steps:
            queries = [min(n, WIDTH * SIZE - h) for n, h in zip(queries, history, strict=True)]
            meta = metadata(queries, history, table)
            new = rng.normal(size=(2, TOKENS, HEADS, DIM)) * 4.0 ** rng.integers(-8, 3, (2, TOKENS, HEADS, 1))
            new = new.astype(np.float32)
            new[:, sum(queries) :] = np.nan  # padding
            cache = write(cache, new, meta, backend)
            for i in range(2):
                reference_write(expected[i], expected[2][i], new[i], meta)
            assert_same(cache, expected)
            history = [h + n for h, n in zip(history, queries, strict=True)]

    check()


@pytest.mark.parametrize("codes", CODES, ids=["int8", "e4m3"])
def test_filling_a_block_token_by_token_costs_less_than_one_step_of_its_scale(codes: jnp.dtype) -> None:
    """Each token twice as large as the one before: the block is rounded again at each."""
    rng = np.random.default_rng(1)
    table = np.arange(ROWS * WIDTH, dtype=np.int32).reshape(ROWS, WIDTH)
    x = rng.uniform(-1, 1, (2, SIZE, HEADS, DIM)).astype(np.float32) * 2.0 ** np.arange(SIZE)[None, :, None, None]
    cache = empty_cache(codes)
    for t in range(SIZE):
        new = np.zeros((2, TOKENS, HEADS, DIM), np.float32)
        new[:, 0] = x[:, t]
        cache = write(cache, new, metadata([1, 0, 0], [t, 0, 0], table), "xla")
    for i in range(2):
        scale = cache[2][i][0].astype(np.float64)[None, :, None]
        error = np.abs(cache[i][0].astype(np.float64) * scale - x[i])
        step = scale if codes == jnp.int8 else np.maximum(np.abs(x[i]) * 2.0**-4, scale * 2.0**-9)
        assert (error < step).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_donated_cache_is_written_in_place(backend: Backend) -> None:
    pages, scale = jnp.zeros((512, 16, 2, 16), jnp.int8), jnp.zeros((512, 2))
    meta = BatchMetadata(jnp.array([0, 1]), jnp.array([1]), jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, jnp.int32))
    kv = jnp.ones((1, 2, 16))
    step = jax.jit(functools.partial(kv_write_quantized, backend=backend), donate_argnums=(0, 1, 2))
    memory = step.lower(pages, pages, KVScales(scale, scale), kv, kv, meta).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * pages.nbytes + 2 * scale.nbytes
    assert memory.temp_size_in_bytes < pages.nbytes / 2


def test_what_it_cannot_write_it_refuses() -> None:
    k, v, scales = jax.tree.map(jnp.asarray, empty_cache(jnp.int8))
    kv = jnp.zeros((TOKENS, HEADS, DIM))
    meta = metadata([1, 0, 0], [0, 0, 0], np.zeros((ROWS, WIDTH), np.int32))
    with pytest.raises(ConfigError, match=r"native attention backend has no quantised KV cache: set .* to 'xla'"):
        kv_write_quantized(k, v, scales, kv, kv, meta, backend="native")
    with pytest.raises(ValueError, match="cache is float32 and float32: use int8 or float8_e4m3fn"):
        kv_write_quantized(k.astype(jnp.float32), v.astype(jnp.float32), scales, kv, kv, meta, backend="xla")
    with pytest.raises(ValueError, match="do not fit a cache"):
        kv_write_quantized(k, v, scales, kv[:, :1], kv[:, :1], meta, backend="xla")
