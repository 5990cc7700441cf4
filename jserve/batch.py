"""How a step plan travels to the device: one flat int32 vector for the backbone, one for the sampler.

`pack_*` writes the vector on the host and `unpack_*` reads it inside jit; a layout is written down once, as the list
of its parts, and both sides follow it. Shapes depend on the token bucket T (backbone) or row bucket R (sampler) alone.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32

from jserve.pallas_kernels.metadata import BatchMetadata
from jserve.sched.plan import Row, StepPlan


class Forward(NamedTuple):
    """Input of the backbone, T tokens."""

    tokens: Int32[Array, "T"]
    """Token ids; -1 - slot where the token is the newest of that slot, and may be known to the device alone."""
    positions: Int32[Array, "T"]
    sampled: Int32[Array, "S"]
    """The token whose hidden state sampling row i needs."""
    attention: BatchMetadata

    @property
    def live(self) -> Int32[Array, ""]:
        """Tokens that are not padding."""
        return self.attention.query_start[-1]


class Head(NamedTuple):
    """Input of the sampler, R rows."""

    flags: Int32[Array, "3"]
    live: Int32[Array, ""]
    """Rows that are not padding."""
    slots: Int32[Array, "R"]
    output_index: Int32[Array, "R"]


class Limits(NamedTuple):
    """The fixed sizes behind every layout."""

    slots: int
    blocks_per_sequence: int
    block_size: int
    num_blocks: int

    def rows(self, tokens: int) -> int:
        """Rows that a batch of so many tokens can have."""
        return min(tokens, self.slots)


def forward_sizes(tokens: int, limits: Limits) -> tuple[int, ...]:
    """Words of each part: tokens, positions, kv_slot, sampled, query_start, context_len, block_table."""
    rows = limits.rows(tokens)
    return tokens, tokens, tokens, limits.slots, rows + 1, rows, rows * limits.blocks_per_sequence


def unpack_forward(words: Int32[Array, "words"], tokens: int, limits: Limits) -> Forward:
    ends = np.cumsum(forward_sizes(tokens, limits))
    ids, positions, kv_slot, sampled, query_start, context_len, table = np.split(np.arange(ends[-1]), ends[:-1])

    def part(of: np.ndarray) -> Array:
        return words[of[0] : of[-1] + 1]

    attention = BatchMetadata(
        query_start=part(query_start),
        context_len=part(context_len),
        block_table=part(table).reshape(limits.rows(tokens), limits.blocks_per_sequence),
        kv_slot=part(kv_slot),
    )
    return Forward(part(ids), part(positions), part(sampled), attention)


def pack_forward(plan: StepPlan, tables: np.ndarray, tokens: int, limits: Limits) -> np.ndarray:
    """The plan as the backbone of bucket `tokens` reads it. `tables` has the block table of every slot."""
    rows, num_rows = plan.rows, len(plan.rows)
    counts = np.array([row.count for row in rows], np.int32)
    starts = np.array([row.start for row in rows], np.int32)
    slots = np.array([row.sequence.slot for row in rows], np.int32)
    words = np.zeros(sum(forward_sizes(tokens, limits)), np.int32)
    ends = np.cumsum(forward_sizes(tokens, limits))
    ids, positions, kv_slot, sampled, query_start, context_len, table = np.split(words, ends[:-1])

    filled = plan.num_tokens
    row_end = np.cumsum(counts)
    row_of = np.repeat(np.arange(num_rows), counts)
    positions[:filled] = np.arange(filled) - (row_end - counts)[row_of] + starts[row_of]
    blocks = tables[slots[row_of], positions[:filled] // limits.block_size]
    kv_slot[:filled] = blocks * limits.block_size + positions[:filled] % limits.block_size
    kv_slot[filled:] = limits.num_blocks * limits.block_size
    query_start[1 : num_rows + 1] = row_end
    query_start[num_rows + 1 :] = filled
    context_len[:num_rows] = starts + counts
    table.reshape(-1, limits.blocks_per_sequence)[:num_rows] = tables[slots]
    ends_sampled = row_end[np.array([row.samples for row in rows], np.bool_)] - 1
    sampled[: len(ends_sampled)] = ends_sampled
    _fill_tokens(ids, rows)
    return words


def _fill_tokens(ids: np.ndarray, rows: list[Row]) -> None:
    at = 0
    for row in rows:
        known = row.sequence.tokens
        if row.start >= len(known):
            ids[at] = -1 - row.sequence.slot
        elif row.count == 1:
            ids[at] = known[row.start]
        else:
            ids[at : at + row.count] = known[row.start : row.start + row.count]
        at += row.count


def head_sizes(rows: int) -> tuple[int, ...]:
    """Words of each part: flags, live, slots, output_index."""
    return 3, 1, rows, rows


def pack_head(sampling: list[Row], slot_flags: np.ndarray, rows: int, limits: Limits) -> np.ndarray:
    """The sampling rows of a plan as the sampler of bucket `rows` reads them. `slot_flags` is [slots, 3]."""
    words = np.zeros(sum(head_sizes(rows)), np.int32)
    flags, live, slots, output_index = np.split(words, np.cumsum(head_sizes(rows))[:-1])
    count = len(sampling)
    live[:] = count
    slots[:count] = [row.sequence.slot for row in sampling]
    slots[count:] = limits.slots  # padding: out of range
    output_index[:count] = [row.start + row.count - row.sequence.num_prompt for row in sampling]
    flags[:] = slot_flags[slots[:count]].any(axis=0)
    return words


def unpack_head(words: Int32[Array, "words"], rows: int) -> Head:
    flags, live, slots, output_index = jnp.split(words, np.cumsum(head_sizes(rows))[:-1])
    return Head(flags, live[0], slots, output_index)


TOKEN_BUCKETS = (
    1,
    4,
    8,
    16,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    6144,
    8192,
)
COPY_BUCKETS = (1, 4, 16)
"""Blocks that one program gathers from or scatters into the pool."""
DIRECT_COPY_BLOCKS = 256
"""Blocks that one program copies between the pool and host memory, where these are the same: padding costs nothing."""
ROW_BUCKETS = (1, 4, 8, 16, 32, 64, 128, 256, 512)


def buckets_up_to(most: int, buckets: tuple[int, ...]) -> tuple[int, ...]:
    """The buckets below `most`, and `most` itself."""
    return (*(b for b in buckets if b < most), most)


def bucket_for(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `size`."""
    return next(b for b in buckets if b >= size)
