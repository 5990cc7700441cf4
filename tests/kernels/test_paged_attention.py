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

from jserve.errors import ConfigError
from jserve.pallas_kernels import (
    Backend,
    BatchMetadata,
    KVScales,
    merge_partials,
    native,
    paged_attention,
    pallas_triton,
    partial_attention,
)
from jserve.pallas_kernels.online_softmax import Scoring
from jserve.pallas_kernels.tiles import Tile

pytestmark = pytest.mark.gpu

BACKENDS: tuple[Backend, ...] = ("native", "xla", "pallas")
WITH_OPTIONS: tuple[Backend, ...] = ("xla", "pallas")
"""Those that have lse, sliding window, soft cap and quantised caches."""
TOKENS, ROWS, BLOCKS, WIDTH = 24, 5, 64, 24
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
    width = max(WIDTH, *(-(-context // size) for _, context in rows), 1)
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


def exact_attention(
    batch: Batch, scale: float, window: int | None = None, soft_cap: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Output and lse."""
    out, lse = np.zeros(batch.q.shape, np.float64), np.full(batch.q.shape[:2], -np.inf)
    group = batch.q.shape[1] // batch.k_cache.shape[2]
    size = batch.k_cache.shape[1]
    for r, context in enumerate(batch.context_len):
        begin, end = batch.query_start[r : r + 2]
        for token in range(begin, end):
            last = context - (end - begin) + (token - begin)
            position = np.arange(max(0, last + 1 - (window or last + 1)), last + 1)
            if not len(position):
                continue
            at = batch.block_table[r, position // size], position % size
            k, v = (np.repeat(c[at].astype(np.float64), group, axis=1) for c in (batch.k_cache, batch.v_cache))
            scores = np.einsum("hd,thd->ht", batch.q[token].astype(np.float64), k) * scale
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - top)
            out[token] = np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), v)
            lse[token] = top[:, 0] + np.log(weights.sum(axis=1))
    return out, lse


@functools.partial(
    jax.jit,
    static_argnames=("scale", "backend", "window", "soft_cap"),
    compiler_options={"xla_backend_optimization_level": 0},  # halves the time of these tests, which is compilation
)
def _compiled(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    meta: BatchMetadata,
    scale: float,
    backend: Backend,
    scales: KVScales | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    if backend == "native":
        return paged_attention(q, k, v, meta, scale=scale, backend=backend), None
    return partial_attention(
        q, k, v, meta, scale=scale, backend=backend, scales=scales, window=window, soft_cap=soft_cap
    )


def attend(batch: Batch, backend: Backend, dtype: jnp.dtype = jnp.float32) -> np.ndarray:
    if backend == "native" and (problem := native.unavailable()):
        pytest.skip(f"native backend: {problem}")
    arrays = (jnp.asarray(x, dtype) for x in (batch.q, batch.k_cache, batch.v_cache))
    out, _ = _compiled(*arrays, batch.meta(), scale=batch.q.shape[-1] ** -0.5, backend=backend)
    return np.asarray(out.astype(jnp.float32))


def assert_exact(batch: Batch, backend: Backend, atol: float = 5e-6) -> None:
    expected, _ = exact_attention(batch, batch.q.shape[-1] ** -0.5)
    np.testing.assert_allclose(attend(batch, backend), expected, atol=atol, rtol=0)


def assert_exact_with_lse(
    batch: Batch, backend: Backend, window: int | None = None, soft_cap: float | None = None
) -> None:
    scale = batch.q.shape[-1] ** -0.5
    arrays = map(jnp.asarray, (batch.q, batch.k_cache, batch.v_cache))
    out, lse = _compiled(*arrays, batch.meta(), scale=scale, backend=backend, window=window, soft_cap=soft_cap)
    expected, expected_lse = exact_attention(batch, scale, window, soft_cap)
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=5e-6, rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6, rtol=1e-6)


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
        assert_exact(make_batch(shape, rows, seed, blocks=BLOCKS * 8), backend)

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
    expected, _ = exact_attention(rounded_batch, batch.q.shape[-1] ** -0.5)
    np.testing.assert_allclose(attend(batch, backend, jnp.bfloat16), expected, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("backend", WITH_OPTIONS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_lse_window_and_soft_cap_equal_exact_ones(shape: Heads, backend: Backend) -> None:
    edge = shape.block_size
    batch = make_batch(shape, [(1, 1), (9, 9 + 2 * edge), (1, 3 * edge), (2, 2), (1, 6 * edge + 1)], blocks=128)
    assert_exact_with_lse(batch, backend)
    assert_exact_with_lse(replace(batch, q=batch.q * 4), backend, window=edge + 3, soft_cap=5.0)


@pytest.mark.parametrize("backend", WITH_OPTIONS)
def test_what_lies_before_the_window_never_reaches_a_result(backend: Backend) -> None:
    """Blocks that a sliding window has left behind may belong to others."""
    window = 20
    batch = make_batch(SHAPES[0], [(6, 70), (1, 90), (3, 30)])
    k, v, size = batch.k_cache.copy(), batch.v_cache.copy(), SHAPES[0].block_size
    for row, (queries, context) in enumerate([(6, 70), (1, 90), (3, 30)]):
        for position in range(context - queries - window + 1):
            k[batch.block_table[row, position // size], position % size] = np.nan
            v[batch.block_table[row, position // size], position % size] = np.nan
    assert_exact_with_lse(replace(batch, k_cache=k, v_cache=v), backend, window=window)


@pytest.mark.parametrize("backend", WITH_OPTIONS)
def test_a_bucket_of_as_many_rows_as_tokens_takes_decodes_and_short_prompts(backend: Backend) -> None:
    """No chunk fits it that is worth the kernel for those. Contexts need one split, several, or none."""
    batch = make_batch(SHAPES[0], [(1, 150), (1, 1), (2, 40)], tokens=ROWS)
    assert_exact_with_lse(batch, backend)
    alone = make_batch(SHAPES[0], [(ROWS, ROWS + 16)], tokens=ROWS)
    assert_exact_with_lse(alone, backend)


@pytest.mark.parametrize("heads", [Heads(56, 56, 8, 16), Heads(20, 1, 16, 16), Heads(14, 2, 256, 8)], ids=str)
def test_any_number_of_heads_shares_a_kv_head(heads: Heads) -> None:
    assert_exact_with_lse(make_batch(heads, [(1, 20), (6, 30)]), "pallas")


@pytest.mark.parametrize("kv_tokens", [16, 32])
def test_steps_within_a_block_and_across_blocks_agree(kv_tokens: int) -> None:
    batch = make_batch(SHAPES[4], [(1, 65), (1, 32), (5, 69), (0, 0), (1, 1)])
    scale = batch.q.shape[-1] ** -0.5
    arrays = map(jnp.asarray, (batch.q, batch.k_cache, batch.v_cache))
    out, lse = pallas_triton.attend(
        *arrays,
        None,
        batch.meta(),
        Scoring(scale),
        decode_tile=Tile(16, kv_tokens, 4, 2),
        prefill_tile=Tile(16, kv_tokens, 4, 2),
    )
    expected, expected_lse = exact_attention(batch, scale)
    np.testing.assert_allclose(out, expected, atol=5e-6, rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", WITH_OPTIONS)
def test_holders_of_parts_of_a_context_merge_into_attention_over_all_of_it(backend: Backend) -> None:
    """One holder has the first blocks of each row, one the rest, one nothing: not even of row 1, which is short."""
    shape, cut = SHAPES[0], 32
    batch = make_batch(shape, [(1, 75), (1, 20), (1, 33)])
    first = np.minimum(batch.context_len, cut)
    holders = [
        replace(batch, context_len=first),
        replace(batch, context_len=batch.context_len - first, block_table=np.roll(batch.block_table, -2, axis=1)),
        replace(batch, context_len=np.zeros_like(first)),
    ]
    scale = shape.dim**-0.5
    partials = [
        _compiled(*map(jnp.asarray, (h.q, h.k_cache, h.v_cache)), h.meta(), scale=scale, backend=backend)
        for h in holders
    ]
    assert not np.isfinite(partials[2][1]).any()
    out, lse = merge_partials(*(jnp.stack(x) for x in zip(*partials, strict=True)), backend=backend)
    expected, expected_lse = exact_attention(batch, scale)
    np.testing.assert_allclose(out, expected, atol=5e-6, rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", WITH_OPTIONS)
@pytest.mark.parametrize("codes", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "e4m3"])
def test_a_quantised_cache_attends_with_code_times_scale(codes: jnp.dtype, backend: Backend) -> None:
    """Blocks without a row have NaN scales, and codes of any bits, e4m3's NaN among them, past a row's context."""
    shape, rng = SHAPES[0], np.random.default_rng(0)
    batch = make_batch(shape, [(1, 75), (7, 40), (2, 17)])
    used = np.zeros(BLOCKS, bool)
    used[np.unique(np.concatenate([batch.block_table[r, : -(-n // 16)] for r, n in enumerate(batch.context_len)]))] = 1
    held = ~np.isnan(batch.k_cache)
    raw, scales, dense = [], [], []
    for _ in range(2):
        code = rng.integers(-127, 128, batch.k_cache.shape).astype(np.int8).view(codes)
        code = np.where(held & np.isnan(code.astype(np.float32)), np.asarray(1, codes), code)
        scale = np.where(used[:, None], 2.0 ** rng.integers(-9, -5, (BLOCKS, shape.kv_heads)), np.nan)
        raw.append(jnp.asarray(code))
        scales.append(jnp.asarray(scale, jnp.float32))
        dense.append((code.astype(np.float64) * scale[:, None, :, None]).astype(np.float32))
    out, lse = _compiled(
        jnp.asarray(batch.q), *raw, batch.meta(), scale=0.125, backend=backend, scales=KVScales(*scales)
    )
    expected, expected_lse = exact_attention(replace(batch, k_cache=dense[0], v_cache=dense[1]), 0.125)
    np.testing.assert_allclose(out, expected, atol=5e-6 * np.abs(expected).max(), rtol=0)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", WITH_OPTIONS)
def test_small_scales_do_not_vanish_in_float16(backend: Backend) -> None:
    """A weight of 1/75 times a scale of 2**-16 has two bits left in float16."""
    rng = np.random.default_rng(0)
    batch = make_batch(SHAPES[0], [(1, 75)])
    codes = [rng.integers(-127, 128, batch.k_cache.shape).astype(np.int8) for _ in range(2)]
    scales = KVScales(*(jnp.full((BLOCKS, 3), scale, jnp.float32) for scale in (2.0**-6, 2.0**-16)))
    dense = [c.astype(np.float32) * float(s[0, 0]) for c, s in zip(codes, scales, strict=True)]
    q = np.asarray(batch.q, np.float16)
    out, _ = _compiled(
        jnp.asarray(q), *map(jnp.asarray, codes), batch.meta(), scale=0.01, backend=backend, scales=scales
    )
    expected, _ = exact_attention(replace(batch, q=q.astype(np.float32), k_cache=dense[0], v_cache=dense[1]), 0.01)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out[0], expected[0], atol=0.01 * np.abs(expected[0]).max(), rtol=0)


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


def test_what_the_native_backend_lacks_it_says() -> None:
    batch = make_batch(Heads(4, 4, 8, 4), [(1, 3)])
    arrays = [jnp.asarray(x) for x in (batch.q, batch.k_cache, batch.v_cache)]
    with pytest.raises(ConfigError, match=r"does not have lse: set .* to 'xla'"):
        partial_attention(*arrays, batch.meta(), scale=1.0, backend="native")
    with pytest.raises(ConfigError, match=r"does not have scales, window and soft_cap: set .* to 'xla'"):
        paged_attention(*arrays, batch.meta(), scale=1.0, backend="native", window=4)


def test_a_cache_that_triton_would_address_wrongly_is_refused() -> None:
    """Its 32-bit offsets are signed, and it takes 64 bits for more than 2**32 bytes only."""

    def check(blocks: int, dtype: jnp.dtype) -> None:
        pallas_triton.check_addressable(jax.ShapeDtypeStruct((blocks, 16, 32, 128), dtype))

    check(40_000, jnp.bfloat16)  # 2.6e9 numbers in 5.2e9 bytes
    check(32_767, jnp.int8)
    check(70_000, jnp.int8)
    with pytest.raises(ConfigError, match=r"set cache.device_blocks lower or tp higher"):
        check(40_000, jnp.int8)


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
    with pytest.raises(ValueError, match="scales need int8 or float8_e4m3fn"):
        paged_attention(
            *map(jnp.asarray, (batch.q, batch.k_cache, batch.v_cache)),
            batch.meta(),
            scale=1.0,
            backend="xla",
            scales=KVScales.empty(64, 4),
        )
