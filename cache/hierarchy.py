"""The KV hierarchy: device pool, host memory, disk (FlashGen-Cache, §3.2 and §3.3), as one cache.

`TieredCache` is a `KVCache` that also decides what is copied between the tiers, and has the Transfer door do it:

- write-through: a full block is copied to the host right after the step that computes it was launched, within a
  budget, so that reclaiming a device block never needs a copy; from the host it goes to disk in the background.
- staging: when a request arrives, it is decided how much of what only disk has of its prefix is read to the host while
  it queues, within the staging region; the rest is asked for later, or computed again.
- loading: an admitted request gets its device blocks and waits, outside of any batch, until the host's blocks have
  been copied into them; other requests' steps go on. Where a copy has its turn before the next step, it waits for none.
- swapping: what a preempted sequence has not on the host yet is copied there before its blocks are taken, and kept.

A tier holds a block only with all blocks before it in its chain, for none is evicted before those after it. So how far
a prefix reaches is found by bisection, a prefix is pinned by its last block, and to decide costs the same for a long
history as for a short one. What a fault has torn out of a chain shows when the blocks are used one by one: when they
are read, awaited or admitted.

Nothing here waits. Every wait of a request has a deadline, after which it computes what has not come. A completion that
nobody waits for any more is dropped. What cannot be read, written or found costs time, never a wrong token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from jserve.cache.block_keys import extend_keys
from jserve.cache.cost import CostModel, LinkCost, Reach, Strategy, SwapDecision, swap_or_recompute
from jserve.cache.disk_tier import DiskTier, Pause
from jserve.cache.host_tier import HostTier
from jserve.cache.kv_cache import Admission, BlockTable, KVCache, Staging
from jserve.cache.restore import ENDLESS, Load, Operation, Read, Restore, Store, Write
from jserve.cache.tier_stats import TierStats
from jserve.cache.transfer import Completion, Transfer

STORES_IN_FLIGHT = 4
READS_IN_FLIGHT = 16
WRITES_IN_FLIGHT = 4


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
        device_reuse: bool = True,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(num_blocks, block_size)
        self.transfer, self.host, self.disk = transfer, host, disk
        self.cost, self.strategy = cost, strategy
        self.staging_blocks, self.store_budget, self.wait_limit_s = staging_blocks, store_budget, wait_limit_s
        self.device_reuse = device_reuse
        """Whether the device keeps the KV of those that have released it."""
        self.tier_stats = TierStats()
        self._note = note
        self._next_ticket = 0
        self._tickets: dict[int, Operation] = {}
        self._unstored: deque[tuple[bytes, bytes | None, int]] = deque()  # key, parent, device block
        self._restores: dict[Restore, None] = {}  # in order of arrival
        self._timed: dict[Restore, None] = {}  # those that wait for a copy, or have waited
        self._unread: dict[Restore, None] = {}  # those with blocks still to be asked for from disk
        self._deferred: dict[Restore, None] = {}
        self._staged = 0
        self._queued_s = 0.0
        self._running = 0
        """Requests that held blocks when the last one arrived."""
        self._queue_changed = False
        self._torn = False
        self._now_s = 0.0

    # --- arrival: what to restore -------------------------------------------------------------------------------

    def arrive(self, table: BlockTable, token_ids: list[int], *, waiting: int, running: int = 0) -> Staging | None:
        self._running = running
        extend_keys(table.keys, table.root, token_ids, self.block_size)
        num_tokens = len(token_ids)
        table.restore = restore = Restore(table, num_tokens, self.cost.prefill.seconds(num_tokens))
        self._restores[restore] = None
        # Those ahead will keep it waiting for as long as their prompts take, at the least.
        self._decide(restore, waiting, self._queued_s)
        self.tier_stats.deferred_requests += restore in self._deferred
        self._queued_s += restore.prefill_s
        self._queue_changed = True
        deferred = restore.wanted - restore.split
        return Staging(restore.staging, deferred) if restore.staging or deferred else None

    def _decide(self, restore: Restore, waiting: int, hidden_s: float) -> None:
        """How much of the prefix to restore; pins what the host has of it. `poll` reads what only disk has."""
        keys = restore.table.keys
        device, host, disk = self._reaches(keys, min(self._most_blocks(restore.num_tokens), len(keys)))
        room = max(0, self.staging_blocks - self._staged)
        reach = Reach(restore.num_tokens, device, host, disk, waiting, hidden_s, room, others=waiting + self._running)
        plan = self.strategy(self.cost, reach)
        restore.split = device + plan.load_host_blocks + plan.stage_disk_blocks
        restore.wanted = restore.split + plan.deferred_disk_blocks
        restore.above_disk = min(restore.above_disk, host)
        restore.next_read = min(host, restore.split)
        restore.settled = restore.next_read if not self.host.num_filling else min(device, restore.split)
        self._pin(restore, restore.next_read)
        self._count(plan.load_host_blocks, plan.stage_disk_blocks, disk - restore.wanted)
        if plan.deferred_disk_blocks:
            self._deferred[restore] = None
        else:
            self._deferred.pop(restore, None)
        if plan.stage_disk_blocks:
            self._unread[restore] = None
            restore.staging += plan.stage_disk_blocks
            self._staged += plan.stage_disk_blocks
        if restore.settled < restore.split:
            self._wait(restore)

    def _reaches(self, keys: list[bytes], most: int) -> tuple[int, int, int]:
        """Leading blocks on the device; on it or the host; on any tier. They are used by this."""
        device, host = self.index.reach(keys, most), self.host.reach(keys, most)
        self.host.use(keys, host)
        host = max(device, host)
        if self.disk is None or not self.disk.reading.is_over(self._now_s):
            return device, host, host
        disk = self.disk.reach(keys, most)
        self.disk.use(keys, disk)
        return device, host, max(host, disk)

    def _count(self, loaded: int, staged: int, recomputed: int) -> None:
        stats = self.tier_stats
        stats.decisions += 1
        stats.load_decisions += loaded > 0
        stats.stage_decisions += staged > 0
        stats.recompute_decisions += recomputed > 0
        stats.recomputed_blocks += recomputed

    def _pin(self, restore: Restore, count: int) -> None:
        """Keep what the host has of the first `count` blocks, and nothing else, for this request."""
        keys = restore.table.keys
        here = self.host.reach(keys, count)
        key = keys[here - 1] if here else None
        if key == restore.pin:
            return
        if key is not None:
            self.host.pin(key)
        if restore.pin is not None:
            self.host.unpin(restore.pin)
        restore.pin = key

    def _wait(self, restore: Restore) -> None:
        restore.deadline_s = self._now_s + self.wait_limit_s
        self._timed[restore] = None

    def is_ready(self, table: BlockTable) -> bool:
        """Whether nothing that is under way could still spare the request computation."""
        return table.restore is None or self._advance(table.restore)

    def _advance(self, restore: Restore) -> bool:
        """Go past the blocks that are there; whether that is all of them up to the split."""
        keys = restore.table.keys
        while restore.settled < restore.split:
            key = keys[restore.settled]
            if self.index.block_of(key) is None:  # else nobody needs to wait for a copy of it
                if self.host.is_filling(key):
                    return False
                if key not in self.host:
                    if restore.settled >= restore.next_read:
                        return False
                    self._cut(restore)  # it was lost on its way
                    return True
            restore.settled += 1
        return True

    def _cut(self, restore: Restore) -> None:
        """What is not there yet will be computed."""
        self._give_room_back(restore, max(0, restore.split - restore.next_read))
        restore.split = restore.settled
        restore.next_read = min(restore.next_read, restore.split)
        self._unread.pop(restore, None)
        self._pin(restore, restore.split)

    # --- staging ------------------------------------------------------------------------------------------------

    def _stage(self) -> None:
        """Read from disk what was decided, in order of arrival and a few blocks at a time."""
        room = READS_IN_FLIGHT - self._in_flight(Read)
        for restore in list(self._unread):
            while room > 0 and restore.next_read < restore.split:
                room -= self._read_next(restore)
            if restore.next_read < restore.split:
                return
            self._unread.pop(restore, None)

    def _read_next(self, restore: Restore) -> bool:
        """Have the next block come from disk, if it must; False if nothing was started."""
        assert self.disk is not None
        i, keys = restore.next_read, restore.table.keys
        key, parent = keys[i], keys[i - 1] if i else None
        restore.next_read += 1
        if key in self.host or self.index.block_of(key) is not None:  # others have brought it meanwhile
            self._give_room_back(restore, 1)
            self._pin(restore, i + 1)
            return False
        there = self.disk.reading.is_over(self._now_s) and key in self.disk
        slot = self.host.reserve(key, parent) if there else None
        if slot is None:
            self._give_room_back(restore, restore.split - i)
            restore.split = restore.next_read = i
            return False
        self._pin(restore, i + 1)
        self.disk.learn(key, parent)
        restore.reading += 1
        self.tier_stats.staged_blocks += 1
        read = Read(key, self.disk.version(key), restore, self._now_s)
        self.transfer.read(self._ticket(read), key, slot)
        return True

    def _give_room_back(self, restore: Restore, blocks: int) -> None:
        restore.staging -= blocks
        self._staged -= blocks

    def _stage_deferred(self) -> None:
        if not self._deferred or self._staged >= self.staging_blocks:
            return
        hidden_s = 0.0
        for waiting, restore in enumerate(list(self._restores)):
            if restore in self._deferred and self._advance(restore):
                self._decide(restore, max(1, waiting), hidden_s)
            if self._staged >= self.staging_blocks:
                return
            hidden_s += restore.prefill_s

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
        self._store_again(table, found)
        self._count_hits(table, places, len(found))
        loading = False
        if places:
            table.num_published = places[0]
            loading = not self._load(table, places, len(found))
        else:
            table.num_published = len(found)
            self._settle(table)
        return Admission(len(found) * self.block_size, loading)

    def _store_again(self, table: BlockTable, found: list[int | None]) -> None:
        """What the device has kept and the host has not, because its store was skipped or it was evicted."""
        if len(self._unstored) >= self.num_blocks:
            return  # all of it waits already, or more than the host can take
        for i in range(self.host.reach(table.keys, len(found)), len(found)):
            block = found[i]
            if block is not None:
                self._unstored.append((table.keys[i], table.keys[i - 1] if i else None, block))

    def _load(self, table: BlockTable, places: list[int], reach: int) -> bool:
        """Start copying these blocks of the table from the host; `reach`: leading blocks that are there then.

        True if the steps to come may use them without waiting.
        """
        restore = table.restore
        if restore is None:
            table.restore = restore = Restore(table, 0, split=reach)
            self._restores[restore] = None
        restore.device_blocks, restore.reach_blocks = places[0], reach
        self._deferred.pop(restore, None)
        self._wait(restore)
        last_of_runs = [table.keys[i] for i, after in zip(places, [*places[1:], -1], strict=True) if after != i + 1]
        for key in last_of_runs:
            self.host.pin(key)
        restore.load_ticket = self._ticket(Load(restore, len(places), last_of_runs))
        slots, blocks = [self.host.slot(table.keys[i]) for i in places], [table.blocks[i] for i in places]
        restore.loaded = self.transfer.load(restore.load_ticket, slots, blocks) or None
        return self.restored(table) is not None

    def _count_hits(self, table: BlockTable, loaded: list[int], reach: int) -> None:
        if table.counted:
            return
        above_disk = table.restore.above_disk if table.restore is not None else ENDLESS
        from_disk = sum(i >= above_disk for i in loaded)
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
        if self.device_reuse:
            super().release(table)
            return
        self._store_missing(table)
        blocks = table.blocks
        super().release(table)
        self.pool.blank(blocks)

    def _settle(self, table: BlockTable) -> None:
        """The one end of every restore, in whatever state: nothing stays pinned, promised or awaited."""
        restore, table.restore = table.restore, None
        if restore is None:
            return
        restore.ended = True
        del self._restores[restore]
        for group in (self._timed, self._deferred, self._unread):
            group.pop(restore, None)
        if restore.pin is not None:
            self.host.unpin(restore.pin)
        # Slots that are still being read into count until the reads have ended.
        self._give_room_back(restore, restore.staging - restore.reading)
        self._queued_s -= restore.prefill_s
        self._queue_changed = True
        if restore.load_ticket is not None and restore.loaded is None:
            self._cancel_load(restore.load_ticket)

    def _cancel_load(self, ticket: int) -> None:
        load = self._tickets.pop(ticket)
        assert isinstance(load, Load)
        self.transfer.cancel(ticket)
        for key in load.pins:
            self.host.unpin(key)

    # --- write-through and swap ---------------------------------------------------------------------------------

    def _on_published(self, table: BlockTable, i: int) -> None:
        self._unstored.append((table.keys[i], table.keys[i - 1] if i else None, table.blocks[i]))

    def write_through(self) -> None:
        """Copy to the host what the launched steps fill, at most `store_budget` blocks a call."""
        if self._unstored and self._in_flight(Store) < STORES_IN_FLIGHT:
            self._store(self._due())

    def _due(self) -> Iterator[tuple[bytes, bytes | None, int]]:
        """What the budget allows. What has come to the host meanwhile or left the device costs none of it, so that no
        more can wait than the device holds."""
        due = 0
        while self._unstored and due < self.store_budget:
            key, parent, block = self._unstored.popleft()
            if key in self.host:
                continue
            if self.index.block_of(key) != block:
                self.tier_stats.skipped_stores += 1
                continue
            due += 1
            yield key, parent, block

    def _store(self, blocks: Iterable[tuple[bytes, bytes | None, int]]) -> None:
        """Copy to the host what it has slots for."""
        keys: list[bytes] = []
        slots: list[int] = []
        sources: list[int] = []
        for key, parent, block in blocks:
            # Without its parent on the host nobody could find it there.
            slot = self.host.reserve(key, parent) if parent is None or parent in self.host else None
            if slot is None:
                self.tier_stats.skipped_stores += 1
                continue
            keys.append(key)
            slots.append(slot)
            sources.append(block)
        if keys:
            self.transfer.store(self._ticket(Store(keys)), sources, slots)

    def _store_missing(self, table: BlockTable) -> None:
        """Copy to the host what it lacks of the table's full blocks, whatever the budget says."""
        keys, full = table.keys, table.num_published
        self._store(
            (keys[i], keys[i - 1] if i else None, table.blocks[i])
            for i in range(self.host.reach(keys, full), full)
            if keys[i] not in self.host
        )

    def swap_out(self, table: BlockTable, num_blocks: int = 0) -> int:
        self._settle(table)
        keys, full = table.keys, table.num_published
        self._store_missing(table)
        self.truncate(table, num_blocks)
        kept = self.host.reach(keys, full)
        table.restore = restore = Restore(table, 0, split=kept, wanted=kept, next_read=kept)
        self._restores[restore] = None
        self._pin(restore, kept)
        self._wait(restore)
        self._queue_changed = True
        self.tier_stats.swapped_blocks += kept
        return kept

    def swap_or_recompute(self, table: BlockTable, num_tokens: int) -> SwapDecision:
        written = self.host.reach(table.keys, table.num_published) * self.block_size
        room = self.host.num_slots - self._staged
        return swap_or_recompute(self.cost, num_tokens, min(written, num_tokens), room)

    def _write_back(self) -> None:
        """Copy to disk, a few blocks at a time, what carries the write-back bit."""
        if self.disk is None or not self.disk.writing.is_over(self._now_s):
            return
        room = WRITES_IN_FLIGHT - self._in_flight(Write)
        while room > 0 and (key := self.host.next_write_back()) is not None:
            if key in self.disk:
                self.disk.learn(key, self.host.parent(key))
                continue
            victims = self.disk.reserve()
            if victims is None:
                self.host.write_back_again(key)
                return
            for victim in victims:
                self.transfer.delete(victim)
            self.host.pin(key)
            self.transfer.write(self._ticket(Write(key, self._now_s)), self.host.slot(key), key)
            room -= 1

    # --- completions --------------------------------------------------------------------------------------------

    def poll(self, now_s: float) -> None:
        """Take what has ended, give up what has taken too long, start what has now room."""
        self._now_s = now_s
        for completion in self.transfer.poll():
            match self._tickets.pop(completion.ticket, None):
                case Store() as store:
                    self._stored(store, completion)
                case Load() as load:
                    self._loaded(load, completion)
                case Read() as read:
                    self._read(read, completion)
                case Write() as write:
                    self._written(write, completion)
        self._expire()
        self._mend()
        self._look_ahead()
        self._write_back()
        self._stage_deferred()
        self._stage()

    @property
    def busy(self) -> bool:
        """Whether polling will bring anything without another request."""
        return bool(self._tickets or self._unstored) or self._can_write_back

    @property
    def _can_write_back(self) -> bool:
        return self.disk is not None and self.host.write_back_backlog > 0 and self.disk.writing.is_over(self._now_s)

    def drain(self) -> None:
        if self.disk is not None:
            self.disk.writing.end()

    def prefill_s(self, tokens: int) -> float | None:
        return self.cost.prefill.seconds(tokens)

    def observe_prefill(self, new: int, cached: int, seconds: float) -> None:
        self.cost.prefill.observe(new, cached, seconds)

    def stats(self) -> dict[str, float]:
        size = self.cost.block_bytes
        tiers: dict[str, float] = {
            "device_bytes": self.num_blocks * size,
            "device_used_bytes": (self.num_blocks - self.pool.num_free + self.pool.num_reclaimable) * size,
            "host_blocks": self.host.num_slots,
            "host_used_blocks": len(self.host),
            "host_used_bytes": len(self.host) * size,
            "host_evictions": self.host.evictions,
            "host_write_back_backlog": self.host.write_back_backlog,
            "staging_blocks": self._staged,
            "copies_in_flight": len(self._tickets),
        }
        if self.disk is not None:
            tiers["disk_blocks"] = self.disk.num_blocks
            tiers["disk_used_blocks"] = len(self.disk)
            tiers["disk_used_bytes"] = len(self.disk) * size
            tiers["disk_evictions"] = self.disk.evictions
            tiers["disk_faults"] = self.disk.faults
            tiers["disk_is_read"] = self.disk.reading.is_over(self._now_s)
            tiers["disk_is_written"] = self.disk.writing.is_over(self._now_s)
        return super().stats() | tiers | asdict(self.tier_stats)

    def close(self) -> None:
        self.transfer.close()

    def _ticket(self, operation: Operation) -> int:
        self._next_ticket += 1
        self._tickets[self._next_ticket] = operation
        return self._next_ticket

    def _in_flight(self, kind: type[Operation]) -> int:
        return sum(isinstance(operation, kind) for operation in self._tickets.values())

    def _stored(self, store: Store, end: Completion) -> None:
        self.tier_stats.store_s += end.seconds
        if end.error is not None:
            self.tier_stats.failed_stores += 1
            for key in store.keys:
                self._lose(key)
            return
        for key in store.keys:
            self.host.fill(key, write_back=self.disk is not None and key not in self.disk)
        self.tier_stats.stored_blocks += len(store.keys)
        self.tier_stats.stored_bytes += end.num_bytes
        self._observe(self.cost.device_to_host, end, len(store.keys) / self.cost.blocks_per_copy)

    def _loaded(self, load: Load, end: Completion) -> None:
        for key in load.pins:
            self.host.unpin(key)
        load.restore.loaded = end.error is None
        self.tier_stats.load_s += end.seconds
        if end.error is not None:
            self.tier_stats.failed_loads += 1
            return
        self.tier_stats.loaded_blocks += load.blocks
        self.tier_stats.loaded_bytes += end.num_bytes
        self._observe(self.cost.host_to_device, end, load.blocks / self.cost.blocks_per_copy)

    def _read(self, read: Read, end: Completion) -> None:
        assert self.disk is not None
        self._end_read(read)
        self.tier_stats.read_s += end.seconds
        if end.error is None:
            self.disk.reading.works()
            self.host.fill(read.key, write_back=False)
            self.tier_stats.read_blocks += 1
            self.tier_stats.read_bytes += end.num_bytes
            self._observe(self.cost.disk_read, end, 1)
            return
        self.tier_stats.failed_reads += 1
        self.tier_stats.corrupt_blocks += end.corrupt
        self.disk.drop(read.key, read.version)  # computed again, it is written again, which mends what cannot be read
        if end.device_fault:
            self._fault(self.disk.reading, "read", end.error)
        self._lose(read.key)

    def _end_read(self, read: Read) -> None:
        read.restore.reading -= 1
        if read.restore.ended:
            self._give_room_back(read.restore, 1)

    def _written(self, write: Write, end: Completion) -> None:
        assert self.disk is not None
        self.tier_stats.write_s += end.seconds
        if end.error is not None:
            self._fail_write(write, end.error)
            return
        self.host.unpin(write.key)
        self.disk.writing.works()
        self.disk.add(write.key, self.host.parent(write.key))
        self.tier_stats.written_blocks += 1
        self.tier_stats.written_bytes += end.num_bytes
        self._observe(self.cost.disk_write, end, 1)

    def _fail_write(self, write: Write, error: str) -> None:
        assert self.disk is not None
        self.host.unpin(write.key)
        self.host.write_back_again(write.key)
        self.disk.give_up()
        self.tier_stats.failed_writes += 1
        self._fault(self.disk.writing, "written", error)

    def _observe(self, link: LinkCost, end: Completion, copies: float) -> None:
        if end.seconds > 0:
            link.observe(end.num_bytes, copies, end.seconds, end.least_s)

    def _fault(self, pause: Pause, doing: str, error: str) -> None:
        assert self.disk is not None
        if not pause.is_over(self._now_s):
            return
        self.disk.faults += 1
        if pause.fault(self._now_s):
            self._note(f"the disk tier is not {doing} for a while, and its share is computed again: {error}")

    def _lose(self, key: bytes) -> None:
        """A block that was on its way to the host has not come."""
        for restore in self._restores:
            if restore.pin == key:  # the slot goes, and its pins with it
                restore.pin = None
        self.host.drop(key)
        self._torn = True

    def _mend(self) -> None:
        """Let the waiting requests know of blocks that were lost, and pin anew what they have before these."""
        if self._torn:
            self._torn = False
            for restore in self._restores:
                self._advance(restore)

    def _expire(self) -> None:
        for restore in [restore for restore in self._timed if self._now_s >= restore.deadline_s]:
            del self._timed[restore]
            self._give_up_waiting(restore)
        late_s = self._now_s - self.wait_limit_s
        for ticket, operation in list(self._tickets.items()):
            if isinstance(operation, Read | Write) and operation.start_s <= late_s:
                self._give_up_disk(ticket, operation)

    def _give_up_waiting(self, restore: Restore) -> None:
        if restore.load_ticket is not None:
            if restore.loaded is None:
                self.tier_stats.expired_waits += 1
                self._cancel_load(restore.load_ticket)
                restore.loaded = False
        elif not self._advance(restore):
            self.tier_stats.expired_waits += 1
            self._deferred.pop(restore, None)  # what is slow now is not asked again
            self._cut(restore)

    def _give_up_disk(self, ticket: int, operation: Read | Write) -> None:
        """A disk that hangs must not keep slots, nor make every later request wait for it."""
        assert self.disk is not None
        self.transfer.cancel(ticket)
        del self._tickets[ticket]
        if isinstance(operation, Write):
            self._fail_write(operation, "a write takes too long")
            return
        self._end_read(operation)
        self.tier_stats.failed_reads += 1
        self._fault(self.disk.reading, "read", "a read takes too long")
        self._lose(operation.key)

    def _look_ahead(self) -> None:
        """Tell the tiers what the queue will need, where they evict by that (CachedAttention)."""
        if not self._queue_changed or not self.host.looks_ahead:
            return
        self._queue_changed = False
        chains = [(restore.table.keys, restore.wanted) for restore in self._restores]
        self.host.set_lookahead(chains)
        if self.disk is not None:
            self.disk.set_lookahead(chains)
