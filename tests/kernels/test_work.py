"""How a batch is cut into programs: each token in one tile, each position of a context in one split."""

from __future__ import annotations

import dataclasses
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jserve.pallas_kernels import BatchMetadata, tiles
from jserve.pallas_kernels.work import block_tiles, make_splits, make_tiles, row_tiles

ROWS, TOKENS, BLOCK = 6, 40, 8
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)

compiled_tiles = jax.jit(make_tiles, static_argnums=(1, 2), static_argnames="longer_than")
compiled_blocks = jax.jit(block_tiles, static_argnums=(1, 2))
compiled_splits = jax.jit(make_splits, static_argnames=("target", "min_tokens", "step"))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Queries and histories of up to ROWS rows with up to TOKENS queries."""
    cuts = sorted(draw(st.lists(st.integers(0, TOKENS), min_size=ROWS, max_size=ROWS)))
    queries = [b - a for a, b in itertools.pairwise([0, *cuts])]
    history = draw(st.lists(st.integers(0, 40), min_size=ROWS, max_size=ROWS))
    return queries, [h if n else 0 for n, h in zip(queries, history, strict=True)]


def metadata(queries: list[int], history: list[int]) -> BatchMetadata:
    start = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    context = (np.array(queries) + np.array(history)).astype(np.int32)
    empty = np.zeros((ROWS, 1), np.int32)
    return BatchMetadata(*map(jnp.asarray, (start, context, empty, np.zeros(TOKENS, np.int32))))


@quick
@given(batch=batches(), size=st.sampled_from([1, 3, 16]), few=st.sampled_from([0, 1, 4]))
def test_every_token_is_in_one_tile(batch: tuple[list[int], list[int]], size: int, few: int) -> None:
    """The short rows by `row_tiles`, the others and the padding by `make_tiles`."""
    queries, history = batch
    meta = metadata(queries, history)
    seen: dict[int, tuple[int, int]] = {}
    for kind in (compiled_tiles(meta, TOKENS, size, longer_than=few), row_tiles(meta, few)):
        for row, token, count, position in np.stack(kind, axis=1).tolist():
            assert count <= max(size, few)
            for i in range(count):
                assert token + i not in seen
                seen[token + i] = row, position + i
    expected = {
        token: (row, position)
        for row in range(ROWS)
        for token, position in zip(
            itertools.count(sum(queries[:row])), range(history[row], history[row] + queries[row]), strict=False
        )
    }
    assert {t: seen[t] for t in expected} == expected
    assert set(seen) == set(range(TOKENS))
    assert all(seen[t][1] < 0 for t in set(seen) - set(expected))


@quick
@given(batch=batches())
def test_every_token_is_in_the_tile_of_its_block(batch: tuple[list[int], list[int]]) -> None:
    queries, history = batch
    written = compiled_blocks(metadata(queries, history), TOKENS, BLOCK)
    seen = []
    for row, token, count, position in np.stack(written, axis=1).tolist():
        assert position % BLOCK + count <= BLOCK
        seen += [(row, token + i, position + i) for i in range(count)]
    assert sorted(seen) == [
        (row, sum(queries[:row]) + i, history[row] + i) for row in range(ROWS) for i in range(queries[row])
    ]


@quick
@given(
    ranges=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3000)), min_size=5, max_size=5),
    target=st.sampled_from([1, 7, 50]),
)
def test_splits_cover_each_range_once_and_evenly(ranges: list[tuple[int, int]], target: int) -> None:
    step, least = 16, 64
    begin = np.array([b for b, _ in ranges], np.int32)
    end = np.array([b + n if n else 0 for b, n in ranges], np.int32)
    splits = compiled_splits(jnp.asarray(begin), jnp.asarray(end), target=target, min_tokens=least, step=step)
    stretches = np.stack([splits.tile, splits.begin, splits.end], axis=1)
    assert len(stretches) == target + len(ranges)
    share = max(least, -(-sum(e - b // step * step for b, e in zip(begin, end, strict=True) if e) // target))
    for i, (first, count) in enumerate(zip(splits.first.tolist(), splits.parts.tolist(), strict=True)):
        mine = stretches[first : first + count]
        assert (mine[:, 0] == i).all()
        if end[i] <= begin[i]:
            assert count == 0
            continue
        assert mine[0, 1] == begin[i] // step * step
        assert mine[-1, 2] == end[i]
        assert (mine[1:, 1] == mine[:-1, 2]).all()
        lengths = mine[:, 2] - mine[:, 1]
        assert (lengths > 0).all()
        assert lengths.max() <= share * 1.01 + step
    assert (stretches[splits.parts.sum() :, 1] == stretches[splits.parts.sum() :, 2]).all()


def test_every_gpu_has_sizes_for_every_kernel_head_and_kind() -> None:
    for key in itertools.product(get_args(tiles.Family), get_args(tiles.Kernel), (64, 128, 256), get_args(tiles.Kind)):
        for size in dataclasses.astuple(tiles.TABLE[tiles.Key(*key)])[:3]:
            assert size & (size - 1) == 0
        assert min(tiles.TABLE[tiles.Key(*key)].rows, tiles.TABLE[tiles.Key(*key)].kv_tokens) >= 16


@pytest.mark.parametrize(
    ("dim", "dtype", "kv_dtype", "expected"),
    [
        (64, jnp.bfloat16, jnp.bfloat16, (64, "16-bit")),
        (80, jnp.float16, jnp.float16, (128, "16-bit")),
        (128, jnp.bfloat16, jnp.int8, (128, "8-bit")),
        (256, jnp.float32, jnp.int8, (256, "float32")),
        (8, jnp.float32, jnp.float32, (64, "float32")),
    ],
)
def test_the_sizes_are_those_of_the_next_larger_head(
    dim: int, dtype: jnp.dtype, kv_dtype: jnp.dtype, expected: tuple[int, tiles.Kind]
) -> None:
    chosen = tiles.choose_tile("decode", dim, dtype, kv_dtype, interpret=False)
    assert chosen == tiles.TABLE[tiles.Key("ampere", "decode", *expected)]
