"""How a ragged batch becomes programs of equal shape: tiles of queries, splits of a context, blocks to write.

Plain JAX on the batch's metadata alone, so that XLA computes it once for all layers of a model.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int32

from jserve.pallas_kernels.metadata import BatchMetadata


class Tiles(NamedTuple):
    """Each up to a fixed number of consecutive tokens of one row; enough tiles for any way to fill the bucket.

    Padding tokens have tiles too, as the queries of a row without a context: their positions are negative.
    """

    row: Int32[Array, "tiles"]
    token: Int32[Array, "tiles"]
    """Index of the tile's first query among the tokens."""
    queries: Int32[Array, "tiles"]
    """Queries in the tile; 0 for a tile that this batch does not need."""
    position: Int32[Array, "tiles"]
    """Of the tile's first query in its row."""

    def context(self) -> Int32[Array, "tiles"]:
        """Tokens that the tile's last query sees."""
        return jnp.where(self.queries > 0, jnp.maximum(self.position + self.queries, 0), 0)


def make_tiles(meta: BatchMetadata, tokens: int, queries: int, *, longer_than: int = 0) -> Tiles:
    """Tiles for all padding, and for the rows with more than `longer_than` queries."""
    rows = meta.context_len.shape[0]
    lengths, starts, contexts = _with_padding(meta, tokens)
    wanted = jnp.where(jnp.arange(rows + 1) < rows, lengths > longer_than, True)
    limit = min(tokens, tokens // queries + min(rows, tokens // (longer_than + 1)) + 1)
    row, first, count = _cut(jnp.where(wanted, lengths, 0), queries, limit)
    position = contexts[row] - lengths[row] + first
    return Tiles(jnp.minimum(row, rows - 1), starts[row] + first, count, position)


def row_tiles(meta: BatchMetadata, at_most: int) -> Tiles:
    """One tile for each row of at most `at_most` queries."""
    lengths = meta.query_start[1:] - meta.query_start[:-1]
    count = jnp.where(lengths <= at_most, lengths, 0)
    row = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    return Tiles(row, meta.query_start[:-1], count, meta.context_len - lengths)


def block_tiles(meta: BatchMetadata, tokens: int, block_size: int) -> Tiles:
    """One tile for each block that the batch's own tokens go into."""
    rows = meta.context_len.shape[0]
    lengths = meta.query_start[1:] - meta.query_start[:-1]
    start = meta.context_len - lengths
    # Cut as if the row began at its first block's edge; then leave out what lies before its first token.
    lead = jnp.where(lengths > 0, start % block_size, 0)
    row, first, count = _cut(lengths + lead, block_size, min(tokens, tokens // block_size + 2 * rows))
    skipped = jnp.maximum(lead[row] - first, 0)
    token = meta.query_start[row] + first + skipped - lead[row]
    position = start[row] + first + skipped - lead[row]
    return Tiles(row, token, jnp.maximum(count - skipped, 0), position)


class Splits(NamedTuple):
    """Stretches of the tiles' contexts, of nearly equal length over the whole batch."""

    tile: Int32[Array, "splits"]
    begin: Int32[Array, "splits"]
    """First position of the stretch."""
    end: Int32[Array, "splits"]
    """Past its last position; equal to `begin` for a split that this batch does not need."""
    first: Int32[Array, "tiles"]
    """Each tile's first split; its others follow."""
    parts: Int32[Array, "tiles"]
    """How many each tile has."""


def make_splits(
    begin: Int32[Array, "tiles"], end: Int32[Array, "tiles"], *, target: int, min_tokens: int, step: int
) -> Splits:
    """About `target` splits of the ranges in all, each of `min_tokens` or more, and at least one a range.

    How many a tile gets follows from the lengths of this batch: few long contexts are cut finely, many are not, and
    a long one beside short ones is. All but a tile's last are whole steps of `step` tokens; `begin` is rounded down to
    one. There are `target` + tiles splits: more cannot be needed.
    """
    begin = begin // step * step
    length = jnp.maximum(end - begin, 0)
    # Summed in float32, for int32 may overflow: it is a target, and need not be exact.
    share = jnp.ceil(length.astype(jnp.float32).sum() / target * 1.0001).astype(jnp.int32)
    count = -(-length // jnp.maximum(share, min_tokens))
    each = -(-length // jnp.maximum(count, 1))
    each = jnp.maximum(-(-each // step) * step, step)
    count = -(-length // each)
    last = jnp.cumsum(count)
    index = jnp.arange(target + begin.shape[0], dtype=jnp.int32)
    tile = _owner(last, index)
    split_begin = begin[tile] + (index - (last[tile] - count[tile])) * each[tile]
    split_end = jnp.minimum(split_begin + each[tile], end[tile])
    split_end = jnp.where(index < last[-1], split_end, split_begin)
    return Splits(tile, split_begin, split_end, last - count, count)


def _with_padding(meta: BatchMetadata, tokens: int) -> tuple[Array, Array, Array]:
    """Queries, first token and context of each row, and of one more that has the padding tokens."""
    starts = meta.query_start
    ends = jnp.append(starts[1:], jnp.int32(tokens))
    return ends - starts, starts, jnp.append(meta.context_len, jnp.int32(0))


def _cut(lengths: Int32[Array, "rows"], size: int, limit: int) -> tuple[Array, Array, Array]:
    """Row, first element and number of elements of each of `limit` pieces of at most `size` elements."""
    pieces = -(-lengths // size)
    ends = jnp.cumsum(pieces)
    index = jnp.arange(limit, dtype=jnp.int32)
    row = _owner(ends, index)
    first = (index - (ends[row] - pieces[row])) * size
    return row, first, jnp.where(index < ends[-1], jnp.clip(lengths[row] - first, 0, size), 0)


def _owner(ends: Int32[Array, "owners"], index: Int32[Array, "n"]) -> Int32[Array, "n"]:
    """The first owner whose end is past the index, or the last one; compared all at once, in one kernel."""
    before = (ends[None, :] <= index[:, None]).sum(axis=1, dtype=jnp.int32)
    return jnp.minimum(before, ends.shape[0] - 1)
