"""Paged attention: every backend equals exact attention in float64, for any ragged batch, and nothing unused leaks.

Pallas runs interpreted here; the GPU jobs compile it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jserve.pallas_kernels import Backend, BatchMetadata, native, paged_attention

BACKENDS: tuple[Backend, ...] = ("native", "xla", "pallas")
TOKENS, ROWS, BLOCKS = 24, 5, 64
"""One bucket for all batches, so that each backend compiles once for each shape of heads."""

Row = tuple[int, int]
"""Queries and context length of a row."""


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    dim: int
    block_size: int

    def __str__(self) -> str:
        return f"{self.heads}q{self.kv_heads}kv{self.dim}d{self.block_size}bs"


SHAPES = (Heads(9, 3, 64, 16), Heads(4, 4, 8, 4), Heads(4, 1, 80, 7), Heads(8, 1, 32, 1), Heads(2, 2, 96, 32))


@dataclass(frozen=True)
class Batch:
    """Arrays in the shape of the bucket. Whatever a correct kernel has no business with is NaN."""

    q: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    query_start: np.ndarray
    context_len: np.ndarray
    block_table: np.ndarray

    def meta(self) -> BatchMetadata:
        no_slot = np.full(len(self.q), self.k_cache.shape[0] * self.k_cache.shape[1], np.int32)
        return BatchMetadata(*map(jnp.asarray, (self.query_start, self.context_len, self.block_table, no_slot)))


def make_batch(
    shape: Heads, rows: list[Row], seed: int = 0, *, tokens: int = TOKENS, blocks: int = BLOCKS, shared_blocks: int = 0
) -> Batch:
    """Rows on randomly placed blocks; the first `shared_blocks` of every row are the same ones."""
    rng = np.random.default_rng(seed)
    size = shape.block_size
    width = max(1, *(-(-context // size) for _, context in rows), 1)
    free = list(rng.permutation(blocks))
    common = [free.pop() for _ in range(shared_blocks)]
    cache = np.full((2, blocks, size, shape.kv_heads, shape.dim), np.nan, np.float32)
    table = np.full((ROWS, width), free[0], np.int32)
    query_start, context_len = np.zeros(ROWS + 1, np.int32), np.zeros(ROWS, np.int32)
    for r, (queries, context) in enumerate(rows):
        context_len[r], query_start[r + 1 :] = context, query_start[r] + queries
        for j in range(-(-context // size)):
            block = common[j] if j < shared_blocks else free.pop()
            table[r, j] = block
            used = min(size, context - j * size)
            fresh = np.isnan(cache[0, block, :used, 0, 0])
            cache[:, block, :used][:, fresh] = rng.normal(size=(2, fresh.sum(), shape.kv_heads, shape.dim))
    q = rng.normal(size=(tokens, shape.heads, shape.dim)).astype(np.float32)
    q[query_start[-1] :] = np.nan
    return Batch(q, *cache, query_start, context_len, table)


def exact_attention(batch: Batch, scale: float) -> np.ndarray:
    out = np.zeros(batch.q.shape, np.float64)
    group = batch.q.shape[1] // batch.k_cache.shape[2]
    size = batch.k_cache.shape[1]
    for r, context in enumerate(batch.context_len):
        begin, end = batch.query_start[r : r + 2]
        for token in range(begin, end):
            position = np.arange(context - (end - begin) + (token - begin) + 1)
            at = batch.block_table[r, position // size], position % size
            k, v = (np.repeat(c[at].astype(np.float64), group, axis=1) for c in (batch.k_cache, batch.v_cache))
            scores = np.einsum("hd,thd->ht", batch.q[token].astype(np.float64), k) * scale
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[token] = np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), v)
    return out


@functools.partial(jax.jit, static_argnames=("scale", "backend"))
def _compiled(
    q: jax.Array, k: jax.Array, v: jax.Array, meta: BatchMetadata, scale: float, backend: Backend
) -> jax.Array:
    return paged_attention(q, k, v, meta, scale=scale, backend=backend)


def attend(batch: Batch, backend: Backend, dtype: jnp.dtype = jnp.float32) -> np.ndarray:
    if backend == "native" and (problem := native.unavailable()):
        pytest.skip(f"native backend: {problem}")
    arrays = (jnp.asarray(x, dtype) for x in (batch.q, batch.k_cache, batch.v_cache))
    out = _compiled(*arrays, batch.meta(), scale=batch.q.shape[-1] ** -0.5, backend=backend)
    return np.asarray(out.astype(jnp.float32))


def assert_exact(batch: Batch, backend: Backend, atol: float = 5e-6) -> None:
    expected = exact_attention(batch, batch.q.shape[-1] ** -0.5)
    np.testing.assert_allclose(attend(batch, backend), expected, atol=atol, rtol=0)


@st.composite
def ragged_rows(draw: st.DrawFn, block_size: int) -> list[Row]:
    """Up to ROWS rows that fit the bucket; lengths at, before and after block edges are likely."""
    edge = st.integers(1, max(1, 48 // block_size)).flatmap(
        lambda n: st.sampled_from([n * block_size - 1, n * block_size, n * block_size + 1])
    )
    rows, left, space = [], TOKENS, BLOCKS - 1
    for _ in range(draw(st.integers(0, ROWS))):
        queries = draw(st.one_of(st.just(1), st.integers(0, left)).filter(lambda n, left=left: n <= left))
        history = draw(st.one_of(st.just(0), edge, st.integers(0, 48)))
        history = min(history, (space * block_size) // ROWS - TOKENS) if queries else 0
        rows.append((queries, queries + max(0, history)))
        left -= queries
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_any_ragged_batch_equals_exact_attention(shape: Heads, backend: Backend) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(rows=ragged_rows(shape.block_size), seed=st.integers(0, 2**31))
    def check(rows: list[Row], seed: int) -> None:
        # A block table of one width, so that shapes repeat.
        batch = make_batch(shape, rows, seed, blocks=BLOCKS * 8)
        pad = 24 - batch.block_table.shape[1]
        table = np.pad(batch.block_table, ((0, 0), (0, max(0, pad))), mode="edge")
        assert_exact(replace(batch, block_table=table), backend)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_chunks_and_decodes_share_a_batch(shape: Heads, backend: Backend) -> None:
    edge = shape.block_size
    batch = make_batch(shape, [(1, 1), (7, 7 + 2 * edge), (1, 3 * edge), (0, 0), (9, 9)], blocks=128)
    assert_exact(batch, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_share_their_first_blocks(backend: Backend) -> None:
    assert_exact(make_batch(SHAPES[0], [(3, 40), (1, 36), (1, 33)], shared_blocks=2), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_comes_out_as_zeros(backend: Backend) -> None:
    """Padding queries are NaN here, as are all blocks without a row."""
    batch = make_batch(SHAPES[0], [(2, 20), (0, 0), (1, 5)])
    assert not attend(batch, backend)[3:].any()
    assert not attend(make_batch(SHAPES[0], []), backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_past_a_context_never_reaches_a_result(backend: Backend) -> None:
    batch = make_batch(SHAPES[0], [(4, 37), (1, 17)])
    expected = attend(batch, backend)
    for poison in (np.inf, 3e38, 7.0):
        caches = (np.where(np.isnan(c), np.float32(poison), c) for c in (batch.k_cache, batch.v_cache))
        other = replace(batch, k_cache=next(caches), v_cache=next(caches))
        np.testing.assert_array_equal(attend(other, backend), expected)


@pytest.mark.parametrize("backend", ["native", "xla"])
def test_long_contexts_with_large_scores(backend: Backend) -> None:
    """Several splits, and scores so far apart that most weights vanish; float32's spacing at 200 is 1.5e-5."""
    batch = make_batch(SHAPES[0], [(2, 1000), (1, 513), (1, 256), (1, 257)], blocks=160)
    assert_exact(replace(batch, q=batch.q * 40), backend, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_loses_only_its_own_rounding(backend: Backend) -> None:
    batch = make_batch(SHAPES[0], [(5, 30), (1, 20)])
    rounded = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (batch.q, batch.k_cache, batch.v_cache))
    rounded_batch = Batch(*rounded, batch.query_start, batch.context_len, batch.block_table)
    expected = exact_attention(rounded_batch, batch.q.shape[-1] ** -0.5)
    np.testing.assert_allclose(attend(batch, backend, jnp.bfloat16), expected, atol=0.02, rtol=0.01)


def _bits(batch: Batch, row: int) -> np.ndarray:
    return attend(batch, "native")[batch.query_start[row] : batch.query_start[row + 1]].view(np.int32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_results_are_the_same_bits_whatever_the_batch(shape: Heads) -> None:
    """Alone, among decodes, beside a prefill chunk big enough that the work is cut for threads."""
    rng = np.random.default_rng(1)
    blocks = 2 + 2 * (700 // shape.block_size)
    batch = make_batch(shape, [(1, 700), (1, 300)], blocks=blocks, tokens=128)
    alone = _bits(replace(batch, query_start=np.array([0, 1, 1, 1, 1, 1], np.int32)), 0)
    mates = np.array([0, 1, 2, 128, 128, 128], np.int32)
    q = rng.normal(size=batch.q.shape).astype(np.float32)
    q[0] = batch.q[0]
    table = batch.block_table.copy()
    table[2] = table[0]
    crowd = replace(
        batch, q=q, query_start=mates, context_len=np.array([700, 300, 700, 0, 0], np.int32), block_table=table
    )
    np.testing.assert_array_equal(_bits(crowd, 0), alone)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_results_are_the_same_bits_however_the_prompt_was_chunked(shape: Heads) -> None:
    total = 600
    whole = make_batch(shape, [(total, total)], tokens=total, blocks=2 + total // shape.block_size)
    expected = _bits(whole, 0)
    for begin, end in ((0, 1), (0, 64), (64, 97), (97, 255), (255, 256), (256, 599), (599, 600)):
        q = np.zeros_like(whole.q)
        q[: end - begin] = whole.q[begin:end]
        starts = np.array([0, *[end - begin] * ROWS], np.int32)
        chunk = replace(whole, q=q, query_start=starts, context_len=np.array([end, 0, 0, 0, 0], np.int32))
        np.testing.assert_array_equal(_bits(chunk, 0), expected[begin:end])


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_device_attends_with_its_own_kv_heads(backend: Backend) -> None:
    shape = Heads(8, 4, 32, 16)
    batch = make_batch(shape, [(5, 30), (1, 20)])
    expected = attend(batch, backend)
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        functools.partial(paged_attention, scale=shape.dim**-0.5, backend=backend),
        mesh=mesh,
        in_specs=(P(None, "tp"), P(None, None, "tp"), P(None, None, "tp"), P()),
        out_specs=P(None, "tp"),
        check_vma=backend != "pallas",  # Pallas cannot declare what its output varies over
    )
    result = jax.jit(sharded)(*map(jnp.asarray, (batch.q, batch.k_cache, batch.v_cache)), batch.meta())
    np.testing.assert_allclose(np.asarray(result), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_table", 10**6, "row 0 names block 1000000 of a pool of 64"),
        ("context_len", 10**6, "row 0 has context_len 1000000"),
        ("query_start", 10**6, "row 0 has queries 1000000"),
    ],
)
def test_native_refuses_metadata_that_points_outside_the_arrays(field: str, value: int, message: str) -> None:
    batch = make_batch(SHAPES[0], [(1, 20)])
    wrong = getattr(batch, field).copy()
    wrong.flat[0] = value
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        attend(replace(batch, **{field: wrong}), "native")


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    batch = make_batch(Heads(4, 4, 8, 4), [(1, 3)])
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads"):
        attend(replace(batch, q=batch.q[:, :3]), "xla")
    with pytest.raises(ValueError, match="use one dtype"):
        paged_attention(
            jnp.asarray(batch.q, jnp.bfloat16),
            jnp.asarray(batch.k_cache),
            jnp.asarray(batch.v_cache),
            batch.meta(),
            scale=1.0,
            backend="xla",
        )
