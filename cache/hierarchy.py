"""The KV hierarchy: device pool, host memory, disk (FlashGen-Cache, §3.2 and §3.3), as one cache.

`TieredCache` is a `KVCache` that also decides what is copied between the tiers, and has the Transfer door do it:

- write-through: a full block is copied to the host right after the step that computes it was launched, within a
  budget, so that reclaiming a device block never needs a copy; from the host it goes to disk in the background.
- staging: when a request arrives, what only disk has of its prefix is read to the host while it queues, if the restore
  strategy says so and the staging region has room; else later, or it is computed again.
- loading: an admitted request gets its device blocks and waits, outside of any batch, until the host's blocks have
  been copied into them; other requests' steps go on.

Nothing here waits. Every wait of a request has a deadline, after which it computes what has not come. A completion that
nobody waits for any more is dropped. What cannot be read, written or found costs time, never a wrong token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from jserve.cache.block_keys import extend_keys
from jserve.cache.cost import CostModel, Reach, Strategy
from jserve.cache.disk_tier import DiskTier, Pause
from jserve.cache.host_tier import HostTier
from jserve.cache.kv_cache import Admission, BlockTable, KVCache, Staging
from jserve.cache.transfer import Completion, Transfer

STORES_IN_FLIGHT = 4
WRITES_IN_FLIGHT = 4


@dataclass(slots=True, eq=False)
class Restore:
    """What one request, waiting or loading, has under way in the tiers. It hangs on the request's block table."""

    split: int
    """Leading blocks that may come from below the device; the rest is computed."""
    prefill_s: float = 0.0
    """What computing the whole prompt is predicted to take: as long as it waits, it hides the reads of others."""
    wanted: int = 0
    """The same, had the staging region endless room."""
    pinned: set[bytes] = field(default_factory=set)
    awaited: dict[bytes, int] = field(default_factory=dict)
    """Blocks that are being read from disk, with their places in the prefix."""
    staged: set[bytes] = field(default_factory=set)
    """Blocks that were read for it: they count against the staging region."""
    deadline_s: float = 0.0
    load_ticket: int | None = None
    loaded: bool | None = None
    """None while the load is under way, then whether it has succeeded."""
    device_blocks: int = 0
    """While loading: leading blocks that needed no load."""
    reach_blocks: int = 0
    """While loading: leading blocks that are there once it has succeeded."""


@dataclass
class TierStats:
    """Counters since start. Tokens are counted once, when a request first has its prefix."""

    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    disk_hit_tokens: int = 0
    staged_blocks: int = 0
    deferred_requests: int = 0
    recomputed_blocks: int = 0
    """Blocks that a tier had, but that were computed again by decision."""
    expired_waits: int = 0
    failed_loads: int = 0
    failed_reads: int = 0
    failed_writes: int = 0
    stored_blocks: int = 0
    loaded_blocks: int = 0
    read_blocks: int = 0
    written_blocks: int = 0
    store_s: float = 0.0
    load_s: float = 0.0
    read_s: float = 0.0
    write_s: float = 0.0
    skipped_stores: int = 0
    """Blocks that were not written through: the host had no slot to give, or the device block was gone."""


@dataclass(slots=True)
class _Store:
    keys: list[bytes]


@dataclass(slots=True)
class _Load:
    restore: Restore
    blocks: int


@dataclass(slots=True)
class _Read:
    key: bytes
    start_s: float


@dataclass(slots=True)
class _Write:
    key: bytes


class TieredCache(KVCache):
    """See the module. Once a step: `poll`, then `schedule` (which calls `admit`), then `write_through`."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        transfer: Transfer,
        host: HostTier,
        disk: DiskTier | None,
        *,
        cost: CostModel,
        strategy: Strategy,
        staging_blocks: int,
        store_budget: int = 16,
        wait_limit_s: float = 10.0,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(num_blocks, block_size)
        self.transfer, self.host, self.disk = transfer, host, disk
        self.cost, self.strategy = cost, strategy
        self.staging_blocks, self.store_budget, self.wait_limit_s = staging_blocks, store_budget, wait_limit_s
        self.tier_stats = TierStats()
        self._note = note
        self._next_ticket = 0
        self._tickets: dict[int, _Store | _Load | _Read | _Write] = {}
        self._unstored: deque[tuple[bytes, bytes | None, int]] = deque()  # key, parent, device block
        self._restores: dict[Restore, tuple[BlockTable, int]] = {}  # in order of arrival, with the prompt's length
        self._timed: dict[Restore, None] = {}  # those that wait for a copy, or have waited
        self._deferred: dict[Restore, None] = {}
        self._waiting_for: dict[bytes, list[Restore]] = {}
        self._staged = 0
        self._queued_s = 0.0
        self._queue_changed = False
        self._now_s = 0.0

    # --- arrival: staging ---------------------------------------------------------------------------------------

    def arrive(self, table: BlockTable, token_ids: list[int], *, waiting: int) -> Staging | None:
        extend_keys(table.keys, table.root, token_ids, self.block_size)
        table.restore = restore = Restore(0, prefill_s=self.cost.prefill.seconds(len(token_ids)))
        self._restores[restore] = table, len(token_ids)
        # Those ahead will keep it waiting for as long as their prompts take, at the least.
        self.tier_stats.recomputed_blocks += self._decide(restore, waiting, self._queued_s)
        self.tier_stats.deferred_requests += restore in self._deferred
        self._queued_s += restore.prefill_s
        self._queue_changed = True
        deferred = restore.wanted - restore.split if restore in self._deferred else 0
        return Staging(len(restore.awaited), deferred) if restore.awaited or deferred else None

    def _decide(self, restore: Restore, waiting: int, hidden_s: float) -> int:
        """How much of the prefix to restore; pin what the host has of it, and start reading what only disk has.

        Returns the blocks that a tier has and that will be computed again nevertheless.
        """
        table, num_tokens = self._restores[restore]
        keys = table.keys[: self._most_blocks(num_tokens)]
        device, host, disk = self._reaches(keys)
        room = max(0, self.staging_blocks - self._staged)
        plan = self.strategy(self.cost, Reach(num_tokens, device, host, disk, waiting, hidden_s, room))
        restore.split = device + plan.load_host_blocks + plan.stage_disk_blocks
        restore.wanted = restore.split + plan.deferred_disk_blocks
        if plan.deferred_disk_blocks:
            self._deferred[restore] = None
        else:
            self._deferred.pop(restore, None)
        for i, key in enumerate(keys[: restore.split]):
            on_device = self.index.block_of(key) is not None
            if key not in self.host and not on_device and not self._stage(restore, key, keys[i - 1] if i else None):
                restore.split = i
                break
            if key in self.host and key not in restore.pinned:
                self._pin(restore, key)
            if key in self.host and not self.host.is_ready(key) and not on_device:
                restore.awaited[key] = i
                self._waiting_for.setdefault(key, []).append(restore)
        if restore.awaited:
            self._wait(restore)
        return disk - restore.wanted

    def _wait(self, restore: Restore) -> None:
        restore.deadline_s = self._now_s + self.wait_limit_s
        self._timed[restore] = None

    def _pin(self, restore: Restore, key: bytes) -> None:
        self.host.pin(key)
        restore.pinned.add(key)

    def _reaches(self, keys: list[bytes]) -> tuple[int, int, int]:
        """Leading blocks on the device; on it or the host; on any tier."""
        device = len(self.index.match(keys))
        host = device
        while host < len(keys) and (self.index.block_of(keys[host]) is not None or keys[host] in self.host):
            host += 1
        self.host.use(keys[:host])
        reach = host
        if self.disk is not None and self.disk.reading.is_over(self._now_s):
            while reach < len(keys) and self._is_anywhere(keys[reach], self.disk):
                reach += 1
            self.disk.use(keys[:reach])
        return device, host, reach

    def _is_anywhere(self, key: bytes, disk: DiskTier) -> bool:
        return self.index.block_of(key) is not None or key in self.host or key in disk

    def _stage(self, restore: Restore, key: bytes, parent: bytes | None) -> bool:
        slot = self.host.reserve(key, parent)
        if slot is None:
            return False
        restore.staged.add(key)
        self._staged += 1
        self.tier_stats.staged_blocks += 1
        self.transfer.read(self._ticket(_Read(key, self._now_s)), key, slot)
        return True

    def is_ready(self, table: BlockTable) -> bool:
        """Whether nothing that is under way could still spare the request computation."""
        return table.restore is None or not table.restore.awaited

    # --- admission: loading -------------------------------------------------------------------------------------

    def _find(self, table: BlockTable, token_ids: list[int]) -> list[int | None]:
        extend_keys(table.keys, table.root, token_ids, self.block_size)
        # What was preempted comes back from the host without having been staged.
        split = table.restore.split if table.restore is not None else self.num_blocks
        found: list[int | None] = []
        for i, key in enumerate(table.keys[: self._most_blocks(len(token_ids))]):
            block = self.index.block_of(key)
            if block is None and (i >= split or not self.host.is_ready(key)):
                break
            found.append(block)
        return found

    def admit(self, table: BlockTable, token_ids: list[int], spare: int = 0) -> Admission | None:
        found = self._find(table, token_ids)
        held = [block for block in found if block is not None]
        if not self._take(table, held, self.blocks_for(len(token_ids)) - len(held), spare):
            return None
        fresh = iter(table.blocks[len(held) :])
        table.blocks = [block if block is not None else next(fresh) for block in found] + list(fresh)
        places = [i for i, block in enumerate(found) if block is None]
        if places:
            table.num_published = places[0]
            self._load(table, places, len(found))
        else:
            table.num_published = len(found)
            self._count_hits(table, len(found), [])
            self._settle(table)
        return Admission(len(found) * self.block_size, loading=bool(places))

    def _load(self, table: BlockTable, places: list[int], reach: int) -> None:
        """Start copying these blocks of the table from the host; `reach`: leading blocks that are there then."""
        restore = table.restore
        if restore is None:
            table.restore = restore = Restore(reach)
            self._restores[restore] = table, 0
        restore.device_blocks, restore.reach_blocks = places[0], reach
        self._deferred.pop(restore, None)
        self._wait(restore)
        keys = [table.keys[i] for i in places]
        for key in keys:
            if key not in restore.pinned:
                self._pin(restore, key)
        restore.load_ticket = self._ticket(_Load(restore, len(keys)))
        slots, blocks = [self.host.slot(key) for key in keys], [table.blocks[i] for i in places]
        self.transfer.load(restore.load_ticket, slots, blocks)
        self._count_hits(table, reach, keys)

    def _count_hits(self, table: BlockTable, reach: int, loaded: list[bytes]) -> None:
        if table.counted:
            return
        staged = table.restore.staged if table.restore is not None else set()
        from_disk = sum(key in staged for key in loaded)
        self.tier_stats.device_hit_tokens += (reach - len(loaded)) * self.block_size
        self.tier_stats.host_hit_tokens += (len(loaded) - from_disk) * self.block_size
        self.tier_stats.disk_hit_tokens += from_disk * self.block_size
        table.counted = True

    def restored(self, table: BlockTable) -> int | None:
        """Of a loading request: the leading tokens that have their KV now, or None while the load is under way."""
        restore = table.restore
        assert restore is not None
        if restore.loaded is None:
            return None
        blocks = restore.reach_blocks if restore.loaded else restore.device_blocks
        for i in range(restore.device_blocks, blocks):
            self.index.publish(table.keys[i], table.blocks[i])
        table.num_published = blocks
        self._settle(table)
        return blocks * self.block_size

    def release(self, table: BlockTable) -> None:
        self._settle(table)
        super().release(table)

    def _settle(self, table: BlockTable) -> None:
        """The one end of every restore, in whatever state: nothing stays pinned, counted or awaited."""
        restore, table.restore = table.restore, None
        if restore is None:
            return
        del self._restores[restore]
        self._timed.pop(restore, None)
        self._deferred.pop(restore, None)
        for key in list(restore.awaited):
            self._stop_waiting(restore, key)
        for key in restore.pinned:
            self.host.unpin(key)
        self._staged -= len(restore.staged)
        self._queued_s -= restore.prefill_s
        self._queue_changed = True
        if restore.load_ticket is not None and restore.loaded is None:
            self.transfer.cancel(restore.load_ticket)
            del self._tickets[restore.load_ticket]

    def _stop_waiting(self, restore: Restore, key: bytes) -> None:
        del restore.awaited[key]
        others = self._waiting_for[key]
        others.remove(restore)
        if not others:
            del self._waiting_for[key]

    # --- write-through ------------------------------------------------------------------------------------------

    def _on_published(self, table: BlockTable, i: int) -> None:
        self._wake(table.keys[i])  # nobody needs to wait for a copy of it any more
        self._unstored.append((table.keys[i], table.keys[i - 1] if i else None, table.blocks[i]))

    def write_through(self) -> None:
        """Copy to the host what the launched steps fill, at most `store_budget` blocks a call."""
        in_flight = sum(isinstance(op, _Store) for op in self._tickets.values())
        if in_flight >= STORES_IN_FLIGHT:
            return
        keys: list[bytes] = []
        slots: list[int] = []
        blocks: list[int] = []
        while self._unstored and len(keys) < self.store_budget:
            key, parent, block = self._unstored.popleft()
            if key in self.host:
                continue
            # Without its parent on the host nobody could find it there.
            wanted = self.index.block_of(key) == block and (parent is None or parent in self.host)
            slot = self.host.reserve(key, parent) if wanted else None
            if slot is None:
                self.tier_stats.skipped_stores += 1
                continue
            keys.append(key)
            slots.append(slot)
            blocks.append(block)
        if keys:
            self.transfer.store(self._ticket(_Store(keys)), blocks, slots)

    def _write_back(self) -> None:
        """Copy to disk, a few blocks at a time, what carries the write-back bit."""
        if self.disk is None or not self.disk.writing.is_over(self._now_s):
            return
        room = WRITES_IN_FLIGHT - sum(isinstance(op, _Write) for op in self._tickets.values())
        while room > 0 and (key := self.host.next_write_back()) is not None:
            if key in self.disk:
                continue
            victims = self.disk.reserve()
            if victims is None:
                self.host.write_back_again(key)
                return
            for victim in victims:
                self.transfer.delete(victim)
            self.host.pin(key)
            self.transfer.write(self._ticket(_Write(key)), self.host.slot(key), key)
            room -= 1

    # --- completions --------------------------------------------------------------------------------------------

    def poll(self, now_s: float) -> None:
        """Take what has ended, give up what has taken too long, start what has now room."""
        self._now_s = now_s
        for completion in self.transfer.poll():
            match self._tickets.pop(completion.ticket, None):
                case _Store(keys):
                    self._stored(keys, completion)
                case _Load(restore, blocks):
                    self._loaded(restore, blocks, completion)
                case _Read(key, _):
                    self._read(key, completion)
                case _Write(key):
                    self._written(key, completion)
        self._expire()
        self._look_ahead()
        self._write_back()
        self._stage_deferred()

    @property
    def busy(self) -> bool:
        """Whether polling will bring anything without another request."""
        return bool(self._tickets or self._unstored)

    def observe_prefill(self, new: int, cached: int, seconds: float) -> None:
        self.cost.prefill.observe(new, cached, seconds)

    def stats(self) -> dict[str, float]:
        tiers = {
            "host_blocks": self.host.num_slots,
            "host_used_blocks": len(self.host),
            "host_evictions": self.host.evictions,
            "host_write_back_backlog": self.host.write_back_backlog,
            "staging_blocks": self._staged,
            "copies_in_flight": len(self._tickets),
        }
        if self.disk is not None:
            tiers["disk_blocks"] = self.disk.num_blocks
            tiers["disk_used_blocks"] = len(self.disk)
            tiers["disk_evictions"] = self.disk.evictions
            tiers["disk_faults"] = self.disk.faults
            tiers["disk_is_read"] = self.disk.reading.is_over(self._now_s)
            tiers["disk_is_written"] = self.disk.writing.is_over(self._now_s)
        return super().stats() | tiers | asdict(self.tier_stats)

    def close(self) -> None:
        self.transfer.close()

    def _ticket(self, operation: _Store | _Load | _Read | _Write) -> int:
        self._next_ticket += 1
        self._tickets[self._next_ticket] = operation
        return self._next_ticket

    def _stored(self, keys: list[bytes], end: Completion) -> None:
        for key in keys:
            if end.error is None:
                self.host.fill(key, write_back=self.disk is not None and key not in self.disk)
                self._wake(key)
            else:
                self._lose(key)
        self.tier_stats.stored_blocks += len(keys) if end.error is None else 0
        self.tier_stats.store_s += end.seconds
        self._observe(self.cost.device_to_host.observe, end, len(keys))

    def _loaded(self, restore: Restore, blocks: int, end: Completion) -> None:
        restore.loaded = end.error is None
        self.tier_stats.loaded_blocks += blocks if restore.loaded else 0
        self.tier_stats.failed_loads += not restore.loaded
        self.tier_stats.load_s += end.seconds
        self._observe(self.cost.host_to_device.observe, end, blocks)

    def _read(self, key: bytes, end: Completion) -> None:
        assert self.disk is not None
        self.tier_stats.read_s += end.seconds
        if end.error is None:
            self.disk.reading.works()
            self.host.fill(key, write_back=False)
            self.tier_stats.read_blocks += 1
            self._observe(self.cost.disk_read.observe, end, 1)
            self._wake(key)
            return
        self.tier_stats.failed_reads += 1
        self.disk.drop(key)  # computed again, it is written again, which mends what cannot be read
        if end.device_fault:
            self._fault(self.disk.reading, "read", end.error)
        self._lose(key)

    def _written(self, key: bytes, end: Completion) -> None:
        assert self.disk is not None
        self.host.unpin(key)
        self.tier_stats.write_s += end.seconds
        if end.error is None:
            self.disk.writing.works()
            self.disk.add(key, self.host.parent(key))
            self.tier_stats.written_blocks += 1
            self._observe(self.cost.disk_write.observe, end, 1)
            return
        self.disk.give_up()
        self.tier_stats.failed_writes += 1
        self.host.write_back_again(key)
        self._fault(self.disk.writing, "written", end.error)

    def _observe(self, observe: Callable[[int, int, float], None], end: Completion, copies: int) -> None:
        if end.error is None and end.seconds > 0:
            observe(end.num_bytes, copies, end.seconds)

    def _fault(self, pause: Pause, doing: str, error: str) -> None:
        assert self.disk is not None
        if not pause.is_over(self._now_s):
            return
        self.disk.faults += 1
        if pause.fault(self._now_s):
            self._note(f"the disk tier is not {doing} for a while, and its share is computed again: {error}")

    def _lose(self, key: bytes) -> None:
        """A block that was on its way to the host has not come."""
        for restore in self._waiting_for.get(key, []):
            restore.split = min(restore.split, restore.awaited[key])
        self._wake(key)
        for restore in self._restores:
            if key in restore.pinned:  # the slot goes, and its pins with it
                restore.pinned.discard(key)
                if key in restore.staged:
                    restore.staged.discard(key)
                    self._staged -= 1
        self.host.drop(key)

    def _wake(self, key: bytes) -> None:
        for restore in list(self._waiting_for.get(key, [])):
            self._stop_waiting(restore, key)

    def _expire(self) -> None:
        self._expire_waits()
        self._expire_reads()

    def _expire_reads(self) -> None:
        """A read that hangs must not keep its slot, nor make every later request wait for the same disk."""
        if self.disk is None:
            return
        reads = ((ticket, op) for ticket, op in self._tickets.items() if isinstance(op, _Read))
        for ticket, read in [(t, op) for t, op in reads if self._now_s >= op.start_s + self.wait_limit_s]:
            self.transfer.cancel(ticket)
            del self._tickets[ticket]
            self.tier_stats.failed_reads += 1
            self._fault(self.disk.reading, "read", "a read takes too long")
            self._lose(read.key)

    def _expire_waits(self) -> None:
        for restore in [restore for restore in self._timed if self._now_s >= restore.deadline_s]:
            del self._timed[restore]
            self._deferred.pop(restore, None)  # what is slow now is not asked again
            if restore.awaited:
                self.tier_stats.expired_waits += 1
                restore.split = min(restore.awaited.values())
                for key in list(restore.awaited):
                    self._stop_waiting(restore, key)
            if restore.load_ticket is not None and restore.loaded is None:
                self.tier_stats.expired_waits += 1
                self.transfer.cancel(restore.load_ticket)
                del self._tickets[restore.load_ticket]
                restore.loaded = False

    def _look_ahead(self) -> None:
        """Tell the tiers what the queue will need, where they evict by that (CachedAttention)."""
        if not self._queue_changed or not self.host.looks_ahead:
            return
        self._queue_changed = False
        keys = [key for restore, (table, _) in self._restores.items() for key in table.keys[: restore.wanted]]
        self.host.set_lookahead(keys)
        if self.disk is not None:
            self.disk.set_lookahead(keys)

    def _stage_deferred(self) -> None:
        for restore in list(self._deferred):
            if self._staged >= self.staging_blocks:
                return
            if not restore.awaited:
                self._decide(restore, waiting=1, hidden_s=0.0)
