"""The ragged batch that the attention kernels read: which tokens belong to which row, and where each row's KV is."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32, Int32


class BatchMetadata(NamedTuple):
    """A batch of R rows with T query tokens in all; every shape is fixed by the compiled bucket.

    The queries of row r are tokens `query_start[r] : query_start[r + 1]`, and are the last ones of the row's
    `context_len[r]` tokens: with n of them, query i sits at position `context_len[r] - n + i`
    and sees every position up to its own. A padding row has no queries and context_len 0. Padding tokens lie after
    the last row's queries.
    """

    query_start: Int32[Array, "rows_plus_1"]
    context_len: Int32[Array, "rows"]
    """Tokens of KV that the row's last query sees, itself included."""
    block_table: Int32[Array, "rows max_blocks"]
    """Block id of the row's positions `j * block_size ...`; entries past the context are any valid block id."""
    kv_slot: Int32[Array, "tokens"]
    """Where each token's own KV goes: block * block_size + offset; a padding token's is out of range, and dropped."""


class KVScales(NamedTuple):
    """What the codes of an int8 or float8_e4m3fn cache are multiplied by, for each block and kv head."""

    k: Float32[Array, "blocks kv_heads"]
    v: Float32[Array, "blocks kv_heads"]

    @classmethod
    def empty(cls, blocks: int, kv_heads: int) -> KVScales:
        """The scales of a cache that nothing has been written to."""
        return cls(jnp.zeros((blocks, kv_heads), jnp.float32), jnp.zeros((blocks, kv_heads), jnp.float32))
