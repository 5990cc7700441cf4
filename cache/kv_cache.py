"""What one sequence holds of the KV cache, and the four moves that change it: admit, extend, publish, release.

`KVCache` joins pool and index. It never sees tokens being computed: the scheduler says how far a sequence's KV has
been launched, and from then on its full blocks can be shared, because the device runs steps in launch order and a
step writes all its KV in a layer before it reads any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jserve.cache.block_keys import extend_keys
from jserve.cache.block_pool import BlockPool
from jserve.cache.cost import SwapDecision
from jserve.cache.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from jserve.cache.gap import Gap
    from jserve.cache.restore import Restore


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence has got its blocks."""

    num_cached: int
    """Leading tokens that need not be computed: whole blocks, and never all tokens of the sequence."""
    loading: bool = False
    """Whether their KV is still on its way to the device: `restored` tells when it is there."""
    host_tokens: int = 0
    """Those of them that come from the host; `disk_tokens`: those that had come there from disk for this sequence."""
    disk_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """Leading tokens of a sequence whose KV is kept, by the nearest tier that has them."""

    device: int = 0
    host: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class Staging:
    """What is read from disk for a sequence that has just arrived."""

    blocks: int
    """Being read now."""
    deferred_blocks: int
    """To be read once the staging region has room."""


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence in order of position, and the keys of those whose tokens are known."""

    root: bytes
    """Key of the empty prefix (`block_keys.root_key`)."""
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    """Leading blocks that are in the index, or need not be, because another block there holds the same KV."""
    restore: Restore | None = None
    """What the tiers below the device are doing for the sequence (`hierarchy.TieredCache`)."""
    gap: Gap | None = None
    """What comes from the tiers while those tokens before it are computed."""
    counted: bool = False
    """Whether its hits by tier have been counted."""
    watched: tuple[bytes, Any] | None = None
    """The key that is watched for it, and who is to be woken (`KVCache.need`)."""


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

    def admit(self, table: BlockTable, token_ids: list[int], spare: int = 0) -> Admission | None:
        """Give an empty table the blocks for all of `token_ids`, found ones first.

        The last token is never cached, because it must be computed to have a next one. Returns None, and changes
        nothing, if the blocks do not fit and leave `spare` free ones.
        """
        found = self._find(table, token_ids)
        held = [block for block in found if block is not None]
        if not self._take(table, held, self.blocks_for(len(token_ids)) - len(held), spare):
            return None
        table.num_published = len(found)
        return Admission(len(found) * self.block_size)

    def fits(self, table: BlockTable, token_ids: list[int], spare: int = 0, without: Iterable[BlockTable] = ()) -> bool:
        """Whether `admit` would succeed if the tables `without` were released first."""
        theirs = Counter(block for other in without for block in other.blocks)
        refs = self.pool.ref_count
        freed = sum(refs(block) == count for block, count in theirs.items())
        found = self._find_without(table, token_ids, theirs)
        shared = sum(block is not None and refs(block) > theirs[block] for block in found)
        return self.blocks_for(len(token_ids)) - shared + spare <= self.pool.num_free + freed

    def needless(
        self, table: BlockTable, token_ids: list[int], spare: int, released: Iterable[BlockTable], last: BlockTable
    ) -> list[bool]:
        """Of tables whose release together with `last`'s lets `admit` succeed: whether each need not be released after
        all, if those before it that need not are not. Counts each block once or twice, however many tables there are.
        """
        tables = list(released)
        theirs = Counter(block for other in (*tables, last) for block in other.blocks)
        refs = self.pool.ref_count
        found = {block for block in self._find_without(table, token_ids, theirs) if block is not None}
        freed = sum(refs(block) == count for block, count in theirs.items())
        shared = sum(refs(block) > theirs[block] for block in found)
        surplus = self.pool.num_free + freed - (self.blocks_for(len(token_ids)) - shared + spare)
        needless = []
        for other in tables:
            # What would not come free, but for what the newcomer would share then.
            loss = sum(refs(block) == theirs[block] and block not in found for block in other.blocks)
            needless.append(loss <= surplus)
            if loss <= surplus:
                surplus -= loss
                theirs.subtract(other.blocks)
        return needless

    def kept(self, table: BlockTable, token_ids: list[int]) -> Kept:
        """Where its KV is, whatever will be restored of it. For people: it uses nothing."""
        return Kept(self.num_found(table, token_ids) * self.block_size)

    def num_found(self, table: BlockTable, token_ids: list[int]) -> int:
        """Leading blocks whose KV is kept, wherever."""
        return len(self._find(table, token_ids))

    def need(self, table: BlockTable, token_ids: list[int], watcher: Any = None) -> int:
        """Free blocks that `admit` would take: all but those that others hold now. Blocks that are kept, but that
        nobody holds, count as free, so they are needed too.

        It rises when others let go of shared blocks. It falls when others come to hold more of the prefix: then the
        index wakes `watcher`, once.
        """
        found = self._find(table, token_ids)
        refs = self.pool.ref_count
        held = [block is not None and refs(block) > 0 for block in found]
        first = held.index(False) if False in held else len(held)
        self._unwatch(table)
        if watcher is not None and self._reuse and first < self._most_blocks(len(token_ids)):
            table.watched = table.keys[first], watcher
            self.index.watch(*table.watched)
        return self.blocks_for(len(token_ids)) - sum(held)

    def _unwatch(self, table: BlockTable) -> None:
        if table.watched is not None:
            self.index.unwatch(*table.watched)
            table.watched = None

    def _find(self, table: BlockTable, token_ids: list[int]) -> list[int | None]:
        """The leading blocks whose KV is kept: on the device under this number, or (None) in a tier below it."""
        extend_keys(table.keys, table.root, token_ids, self.block_size)
        return [*self.index.match(table.keys[: self._most_blocks(len(token_ids))])] if self._reuse else []

    def _find_without(self, table: BlockTable, token_ids: list[int], theirs: Counter[int]) -> list[int | None]:
        """What `_find` would find if each of these blocks had been let go of so many times: as much, if all is kept."""
        return self._find(table, token_ids)

    def _most_blocks(self, num_tokens: int) -> int:
        """Blocks of a prompt that may be found rather than computed."""
        return (num_tokens - 1) // self.block_size

    def _take(self, table: BlockTable, found: list[int], fresh: int, spare: int) -> bool:
        """Give the table the blocks `found`, and behind them so many fresh ones; False, and no change, if too many."""
        if not self._room(found, fresh, spare):
            return False
        self.pool.hold(found)
        allocated = self.pool.allocate(fresh)
        assert allocated is not None, "counted above"
        table.blocks = found + allocated
        self._unwatch(table)
        return True

    def _room(self, found: list[int], fresh: int, spare: int) -> bool:
        revived = sum(self.pool.is_reclaimable(block) for block in found)
        return fresh + revived + spare <= self.pool.num_free

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
            if self.index.publish(table.keys[i], table.blocks[i]):
                self._on_published(table, i)
        table.num_published = full

    def _on_published(self, table: BlockTable, i: int) -> None:
        """Block `i` of the table has just become findable."""

    def release(self, table: BlockTable) -> None:
        """Give every block back. Tails go first, so that the heads of conversations stay longest."""
        self.pool.release(reversed(table.blocks))
        table.blocks = []
        table.num_published = 0
        self._unwatch(table)

    def truncate(self, table: BlockTable, num_blocks: int) -> None:
        """Give back all blocks but the first `num_blocks`: what partial preemption drops."""
        self.pool.release(reversed(table.blocks[num_blocks:]))
        del table.blocks[num_blocks:]
        table.num_published = min(table.num_published, num_blocks)

    def unshared(self, *tables: BlockTable) -> int:
        """Blocks that only these tables hold: so many become free when all of them are released."""
        if len(tables) == 1:
            return sum(self.pool.ref_count(block) == 1 for block in tables[0].blocks)
        holders = Counter(block for table in tables for block in table.blocks)
        return sum(self.pool.ref_count(block) == count for block, count in holders.items())

    # --- what a cache with tiers below the device does more (`hierarchy.TieredCache`) --------------------------------

    def arrive(self, table: BlockTable, token_ids: list[int], *, waiting: int, running: int = 0) -> Staging | None:
        """A sequence has joined the queue behind `waiting` others, while `running` ones hold blocks.

        Returns what is read from disk for it, if any.
        """
        return None

    def ended(self, table: BlockTable, num_tokens: int, answer_tokens: int) -> None:
        """A request has ended after so many tokens, the last of them its answer; its table is about to be released."""

    def is_ready(self, table: BlockTable) -> bool:
        """Whether a waiting sequence should be admitted now, if it fits."""
        return True

    def swap_out(self, table: BlockTable, num_blocks: int = 0) -> int:
        """As `truncate`, for a sequence that comes back: what the host lacks of its full blocks is copied there first,
        and kept there until the table is admitted again or released.

        Returns the leading blocks that the host has then, or will have soon: `is_ready` says when.
        """
        self.truncate(table, num_blocks)
        return 0

    def swap_or_recompute(self, table: BlockTable, num_tokens: int, others: int = 0) -> SwapDecision:
        """Whether a sequence with the KV of `num_tokens` should be swapped out when it is preempted, while `others`
        run.
        """
        return SwapDecision(False, 0.0, 0.0, "recompute: there is no host tier")

    def computable(self, table: BlockTable, num_tokens: int) -> int:
        """How many of the sequence's `num_tokens` tokens can be computed now. With the next one begins a gap, whose KV
        is on its way: `restored` tells when it is there.
        """
        return num_tokens

    def restored(self, table: BlockTable) -> int | None:
        """Of a sequence that loads, or has been computed up to a gap: its leading tokens with KV, or None while these
        are not known.
        """
        raise AssertionError("a cache without tiers loads nothing")

    def poll(self, now_s: float) -> None:
        """Take note of the copies that have ended."""

    def write_through(self, steps: int = 1) -> None:
        """What the launched plan fills, which spans so many steps, may be copied away."""

    @property
    def busy(self) -> bool:
        """Whether copies are under way."""
        return False

    def drain(self) -> None:
        """The engine is about to close: try once more what was put off because the disk had failed, and begin nothing
        that only later requests would need."""

    def prefill_s(self, tokens: int) -> float | None:
        """What computing a prompt is predicted to take, alone; None if that is not known."""
        return None

    def observe_prefill(self, new: int, cached: int, seconds: float) -> None:
        """Computing `new` tokens after `cached` ones took this long, on an otherwise idle device."""

    def stats(self) -> dict[str, float]:
        """Gauges and counters by name: blocks and, with tiers, hits, copies and decisions."""
        return {
            "device_blocks": self.num_blocks,
            "device_held_blocks": self.num_blocks - self.pool.num_free,
            "device_cached_blocks": self.pool.num_reclaimable,
        }

    def close(self) -> None:
        """Nothing is copied any more."""
