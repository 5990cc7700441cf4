"""What one sequence holds of the KV cache, and the four moves that change it: admit, extend, publish, release.

`KVCache` joins pool and index. It never sees tokens being computed: the scheduler says how far a sequence's KV has
been launched, and from then on its full blocks can be shared, because the device runs steps in launch order and a
step writes all its KV in a layer before it reads any.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jserve.cache.block_keys import extend_keys
from jserve.cache.block_pool import BlockPool
from jserve.cache.prefix_index import PrefixIndex


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence in order of position, and the keys of those whose tokens are known."""

    root: bytes
    """Key of the empty prefix (`block_keys.root_key`)."""
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    """Leading blocks that are in the index, or need not be, because another block there holds the same KV."""


class KVCache:
    """The paged KV cache of one device (or one tp group): `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.index = PrefixIndex()
        self.pool = BlockPool(num_blocks, self.index)
        self._reuse = reuse

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def admit(self, table: BlockTable, token_ids: list[int], spare: int = 0) -> int | None:
        """Give an empty table the blocks for all of `token_ids`, found ones first.

        Returns how many leading tokens have their KV already: whole blocks, and never all of `token_ids`, because the
        last token must be computed to have a next one. Returns None, and changes nothing, if the blocks do not fit
        and leave `spare` free ones.
        """
        extend_keys(table.keys, table.root, token_ids, self.block_size)
        most = (len(token_ids) - 1) // self.block_size
        found = self.index.match(table.keys[:most]) if self._reuse else []
        needed = self.blocks_for(len(token_ids)) - len(found)
        revived = sum(self.pool.is_reclaimable(block) for block in found)
        if needed + revived + spare > self.pool.num_free:
            return None
        self.pool.hold(found)
        fresh = self.pool.allocate(needed)
        assert fresh is not None, "counted above"
        table.blocks = found + fresh
        table.num_published = len(found)
        return len(found) * self.block_size

    def extend(self, table: BlockTable, num_tokens: int) -> bool:
        """Let the table reach `num_tokens` tokens; False, and no change, if the pool has no block for that."""
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing <= 0:
            return True
        fresh = self.pool.allocate(missing)
        if fresh is None:
            return False
        table.blocks += fresh
        return True

    def publish(self, table: BlockTable, token_ids: list[int], num_computed: int) -> None:
        """Make findable the full blocks whose tokens are known and whose KV is launched."""
        if not self._reuse:
            return
        full = min(num_computed, len(token_ids)) // self.block_size
        if full <= table.num_published:
            return
        if full > len(table.keys):
            extend_keys(table.keys, table.root, token_ids, self.block_size)
        for i in range(table.num_published, full):
            self.index.publish(table.keys[i], table.blocks[i])
        table.num_published = full

    def release(self, table: BlockTable) -> None:
        """Give every block back. Tails go first, so that the heads of conversations stay longest."""
        self.pool.release(reversed(table.blocks))
        table.blocks = []
        table.num_published = 0
