"""The KV hierarchy: device pool, host memory, disk (FlashGen-Cache, §3.2 and §3.3), as one cache.

`TieredCache` is a `KVCache` that also decides what is copied between the tiers, and has the Transfer door do it:

- write-through (`write_through`): a full block is copied to the host right after the step that computes it was
  launched, so that reclaiming a device block never needs a copy; from the host it goes to disk (`write_back`).
- staging (`staging`): when a request arrives, it is decided how much of what only disk has of its prefix is read to the
  host while it queues, within the staging region; the rest is asked for later, or computed again.
- reading ahead (`read_ahead`): while no request wants the disk, what conversations that will soon return are predicted
  to need is read from it.
- loading: an admitted request gets its device blocks and waits, outside of any batch, until the host's blocks have
  been copied into them; other requests' steps go on. Where a copy has its turn before the next step, it waits for none.
- gaps (`gap`): where that is quicker, the front of a prompt is computed while the end of its prefix is read and copied.
- swapping: what a preempted sequence has not on the host yet is copied there before its blocks are taken, and kept.

A tier holds a block only with all blocks before it in its chain, for none is evicted before those after it. So how far
a prefix reaches is found by bisection, a prefix is pinned by its last block, and to decide costs the same for a long
history as for a short one. What a fault has torn out of a chain shows when the blocks are used one by one: when they
are read, awaited or admitted.

Nothing here waits. Every wait of a request has a deadline, after which it computes what has not come. A completion that
nobody waits for any more is dropped. What cannot be read, written or found costs time, never a wrong token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import asdict
from itertools import takewhile

from jserve.cache.block_keys import extend_keys
from jserve.cache.cost import CostModel, Reach, RestorePlan, Strategy, SwapDecision, swap_or_recompute
from jserve.cache.disk_tier import DiskTier
from jserve.cache.gap import Gap, Gaps
from jserve.cache.host_tier import HostTier
from jserve.cache.kv_cache import Admission, BlockTable, Kept, KVCache, Staging
from jserve.cache.read_ahead import ReadAhead
from jserve.cache.restore import ENDLESS, LATE, GapLoad, GapRead, Load, Operation, Read, Restore, Store, Write
from jserve.cache.staging import StagingRegion
from jserve.cache.tiers import Tiers
from jserve.cache.transfer import Completion, Transfer
from jserve.cache.write_back import WriteBack
from jserve.cache.write_through import WriteThrough

LEAST_GAP_WAIT_S = 0.005


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
        read_ahead_s: float = 0.0,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(num_blocks, block_size)
        self.tiers = Tiers(self.index, host, disk, transfer, cost, note)
        self.host, self.disk, self.cost, self.tier_stats = host, disk, cost, self.tiers.stats
        self.staging = StagingRegion(self.tiers, staging_blocks)
        self.ahead = ReadAhead(self.tiers, self.staging, read_ahead_s)
        self.gaps = Gaps(self.tiers, self.staging)
        self.stores = WriteThrough(self.tiers, store_budget)
        self.writes = WriteBack(self.tiers)
        self.strategy, self.wait_limit_s = strategy, wait_limit_s
        self.device_reuse = device_reuse
        """Whether the device keeps the KV of those that have released it."""
        self._timed: dict[Restore, None] = {}
        """Those that wait for a copy, or have waited."""
        self._queued_s = 0.0
        self._running = 0
        """Requests that held blocks when the last one arrived."""
        self._queue_changed = False

    # --- arrival: what to restore -------------------------------------------------------------------------------

    def arrive(self, table: BlockTable, token_ids: list[int], *, waiting: int, running: int = 0) -> Staging | None:
        self._running = running
        extend_keys(table.keys, table.root, token_ids, self.block_size)
        num_tokens = len(token_ids)
        table.restore = restore = Restore(table, num_tokens, self.tiers.now_s, self.cost.prefill.seconds(num_tokens))
        self.tiers.restores[restore] = None
        # Those ahead will keep it waiting for as long as their prompts take, at the least.
        self._decide(restore, waiting, self._queued_s)
        self.tier_stats.deferred_requests += restore in self.staging.deferred
        self._queued_s += restore.prefill_s
        self._queue_changed = True
        deferred = restore.wanted - restore.split
        reading = restore.staging + (table.gap.end - table.gap.above_disk if table.gap is not None else 0)
        return Staging(reading, deferred) if reading or deferred else None

    def _decide(self, restore: Restore, waiting: int, hidden_s: float) -> None:
        """How much of the prefix to restore; pins what the host has of it. `poll` reads what only disk has."""
        keys = restore.table.keys
        device, host, disk = self._reaches(keys, restore.num_tokens)
        others = waiting + self._running
        reach = Reach(
            restore.num_tokens,
            device,
            host,
            disk,
            waiting,
            hidden_s,
            self.staging.room,
            others,
            disk_wait_s=self.staging.wait_s,
            readers=len(self.staging.unread),
        )
        plan = self.strategy(self.cost, reach)
        restore.split = device + plan.load_host_blocks + plan.stage_disk_blocks
        restore.wanted = restore.split + plan.deferred_disk_blocks
        restore.above_disk = min(restore.above_disk, host)
        restore.next_read = min(host, restore.split)
        restore.settled = restore.next_read if not self.host.num_filling else min(device, restore.split)
        restore.keep(self.host, restore.next_read)
        if plan.gap[1]:
            self.gaps.add(restore.table, *plan.gap, host)
        self._count(plan, reach)
        if plan.deferred_disk_blocks:
            self.staging.deferred[restore] = None
        else:
            self.staging.deferred.pop(restore, None)
        self.staging.promise(restore, plan.stage_disk_blocks)
        if restore.settled < restore.split:
            self._wait(restore)

    def _reaches(self, keys: list[bytes], num_tokens: int) -> tuple[int, int, int]:
        """Leading blocks on the device; on it or the host; on any tier. They are used by this."""
        most = min(self._most_blocks(num_tokens), len(keys))
        device, host = self.index.reach(keys, most), self.host.reach(keys, most)
        self.host.use(keys, host)
        disk = 0
        if self.disk is not None and self.tiers.disk_is_read:
            disk = self.disk.reach(keys, most)
            self.disk.use(keys, disk)
        self.ahead.arrived(keys, num_tokens, {device, host, disk})
        if not self.tiers.host_is_read:
            return device, device, device
        return device, max(device, host), max(device, host, disk)

    def kept(self, table: BlockTable, token_ids: list[int]) -> Kept:
        extend_keys(table.keys, table.root, token_ids, self.block_size)
        keys, most = table.keys, self._most_blocks(len(token_ids))
        device = self.index.reach(keys, most)
        host = max(device, self.host.reach(keys, most))
        disk = max(host, self.disk.reach(keys, most)) if self.disk is not None and self.tiers.disk_is_read else host
        return Kept(device * self.block_size, (host - device) * self.block_size, (disk - host) * self.block_size)

    def _count(self, plan: RestorePlan, reach: Reach) -> None:
        stats = self.tier_stats
        start, end = plan.gap
        brought = plan.load_host_blocks + plan.stage_disk_blocks + end - start
        recomputed = reach.disk_blocks - reach.device_blocks - brought - plan.deferred_disk_blocks
        stats.decisions += 1
        stats.load_decisions += plan.load_host_blocks > 0 or start < min(end, reach.host_blocks)
        stats.stage_decisions += plan.stage_disk_blocks > 0 or end > reach.host_blocks
        stats.recompute_decisions += recomputed > 0
        stats.recomputed_blocks += recomputed

    def _wait(self, restore: Restore) -> None:
        restore.deadline_s = self.tiers.now_s + self.wait_limit_s
        self._timed[restore] = None

    def is_ready(self, table: BlockTable) -> bool:
        """Whether nothing that is under way could still spare the request computation."""
        return table.restore is None or self.staging.advance(table.restore)

    def _stage_deferred(self) -> None:
        if not self.staging.deferred or not self.staging.room:
            return
        hidden_s = 0.0
        for waiting, restore in enumerate(list(self.tiers.restores)):
            if restore in self.staging.deferred and self.staging.advance(restore):
                self._decide(restore, max(1, waiting), hidden_s)
            if not self.staging.room:
                return
            hidden_s += restore.prefill_s

    # --- admission: loading -------------------------------------------------------------------------------------

    def _find(self, table: BlockTable, token_ids: list[int], gone: Set[int] = frozenset()) -> list[int | None]:
        """As far as the device has it or the host. `gone`: blocks of the device that do not count."""
        extend_keys(table.keys, table.root, token_ids, self.block_size)
        # What was preempted comes back from the host without having been staged.
        split = table.restore.split if table.restore is not None else self.num_blocks
        below = split if self.tiers.host_is_read else 0
        block_of, is_ready = self.index.block_of, self.host.is_ready
        found: list[int | None] = []
        for i, key in enumerate(table.keys[: self._most_blocks(len(token_ids))]):
            block = block_of(key)
            if block is None or block in gone:
                if i >= below or not is_ready(key):
                    break
                block = None
            found.append(block)
        return found

    def _find_without(self, table: BlockTable, token_ids: list[int], theirs: Counter[int]) -> list[int | None]:
        if self.device_reuse:
            return self._find(table, token_ids)
        # What nobody else holds is forgotten, and so is all behind it that the host has not got.
        return self._find(table, token_ids, {b for b, held in theirs.items() if self.pool.ref_count(b) == held})

    def admit(self, table: BlockTable, token_ids: list[int], spare: int = 0) -> Admission | None:
        found = self._find(table, token_ids)
        held = [block for block in found if block is not None]
        if not self._take(table, held, self.blocks_for(len(token_ids)) - len(held), spare):
            return None
        fresh = iter(table.blocks[len(held) :])
        table.blocks = [block if block is not None else next(fresh) for block in found] + list(fresh)
        places = [i for i, block in enumerate(found) if block is None]
        self.stores.add_again(table, found, most=self.num_blocks)
        above_disk = table.restore.above_disk if table.restore is not None else ENDLESS
        from_disk = sum(i >= above_disk for i in places)
        self._count_hits(table, len(found), len(places), from_disk)
        loading = False
        if places:
            table.num_published = places[0]
            loading = not self._load(table, places, len(found))
        else:
            table.num_published = len(found)
            self._settle(table)
        if table.gap is not None:
            self.gaps.admitted(table.gap, len(found))
        if table.gap is not None and not loading:
            loading = table.num_published >= table.gap.start
        size = self.block_size
        return Admission(len(found) * size, loading, (len(places) - from_disk) * size, from_disk * size)

    def _load(self, table: BlockTable, places: list[int], reach: int) -> bool:
        """Start copying these blocks of the table from the host; `reach`: leading blocks that are there then.

        True if the steps to come may use them without waiting.
        """
        restore = table.restore
        if restore is None:
            table.restore = restore = Restore(table, 0, split=reach)
            self.tiers.restores[restore] = None
        restore.device_blocks, restore.reach_blocks = places[0], reach
        self.staging.deferred.pop(restore, None)
        self._timed.pop(restore, None)
        last_of_runs = [table.keys[i] for i, after in zip(places, [*places[1:], -1], strict=True) if after != i + 1]
        for key in last_of_runs:
            self.host.pin(key)
        restore.load_ticket = self.tiers.ticket(Load(restore, len(places), last_of_runs, self.tiers.now_s))
        slots, blocks = [self.host.slot(table.keys[i]) for i in places], [table.blocks[i] for i in places]
        restore.loaded = self.tiers.transfer.load(restore.load_ticket, slots, blocks) or None
        return self._take_loaded(table, restore)

    def _count_hits(self, table: BlockTable, reach: int, loaded: int, from_disk: int) -> None:
        if table.counted:
            return
        self.tier_stats.device_hit_tokens += (reach - loaded) * self.block_size
        self.tier_stats.host_hit_tokens += (loaded - from_disk) * self.block_size
        self.tier_stats.disk_hit_tokens += from_disk * self.block_size
        table.counted = True

    def computable(self, table: BlockTable, num_tokens: int) -> int:
        return num_tokens if table.gap is None else table.gap.start * self.block_size

    def restored(self, table: BlockTable) -> int | None:
        restore = table.restore
        if restore is not None and not self._take_loaded(table, restore):
            return None
        gap = table.gap
        if gap is not None and table.num_published >= gap.start and not self._take_gap(table, gap):
            return None
        return table.num_published * self.block_size

    def _take_loaded(self, table: BlockTable, restore: Restore) -> bool:
        """Whether the load has ended."""
        if restore.loaded is None:
            return False
        blocks = restore.reach_blocks if restore.loaded else restore.device_blocks
        for i in range(restore.device_blocks, blocks):
            self.index.publish(table.keys[i], table.blocks[i])
        table.num_published = blocks
        self._settle(table)
        return True

    def _take_gap(self, table: BlockTable, gap: Gap) -> bool:
        """Whether the gap is closed, and the computation can go on after it."""
        if not gap.is_closed:
            if gap.deadline_s == math.inf:
                gap.deadline_s = self.tiers.now_s + self._gap_wait_s(gap)
            return False
        for i in range(gap.start, gap.end):
            if self.index.publish(table.keys[i], table.blocks[i]):
                self._on_published(table, i)
        table.num_published = gap.end
        from_disk = gap.end - gap.first_read
        self.tier_stats.host_hit_tokens += (gap.first_read - gap.start) * self.block_size
        self.tier_stats.disk_hit_tokens += from_disk * self.block_size
        self.tier_stats.closed_gaps += 1
        self.gaps.close(table)
        return True

    def _gap_wait_s(self, gap: Gap) -> float:
        """As long as computing what is missing would take: so it never waits and computes for more than twice the time
        that the better of the two would have taken (ski rental). It holds a slot and blocks as long."""
        missing = (gap.last_missing + 1 - gap.start) * self.block_size
        computing_s = self.cost.prefill.seconds(missing, gap.start * self.block_size)
        return min(max(computing_s, LEAST_GAP_WAIT_S), self.wait_limit_s)

    def ended(self, table: BlockTable, num_tokens: int, answer_tokens: int) -> None:
        self.ahead.ended(table.keys[: table.num_published], num_tokens, answer_tokens)

    def release(self, table: BlockTable) -> None:
        self._settle(table)
        self.gaps.close(table)
        if self.device_reuse:
            super().release(table)
            return
        self.stores.store_missing(table)
        blocks = table.blocks
        super().release(table)
        self.pool.blank(blocks)

    def _settle(self, table: BlockTable) -> None:
        """The one end of every restore, in whatever state: nothing stays pinned, promised or awaited."""
        restore, table.restore = table.restore, None
        if restore is None:
            return
        restore.ended = True
        del self.tiers.restores[restore]
        self._timed.pop(restore, None)
        self.staging.leave(restore)
        if restore.pin is not None:
            self.host.unpin(restore.pin)
        self._queued_s -= restore.prefill_s
        self._queue_changed = True
        if restore.load_ticket is not None and restore.loaded is None:
            self._cancel_load(restore.load_ticket)

    def _cancel_load(self, ticket: int) -> None:
        load = self.tiers.cancel(ticket)
        assert isinstance(load, Load)
        self._unpin(load)

    def _unpin(self, load: Load) -> None:
        for key in load.pins:
            self.host.unpin(key)

    # --- write-through and swap ---------------------------------------------------------------------------------

    def _on_published(self, table: BlockTable, i: int) -> None:
        self.stores.add(table, i)

    def write_through(self, steps: int = 1) -> None:
        """Copy to the host what the launched steps fill."""
        self.stores.step(steps)

    def truncate(self, table: BlockTable, num_blocks: int) -> None:
        self.gaps.close(table)  # its blocks are among those given back
        super().truncate(table, num_blocks)

    def swap_out(self, table: BlockTable, num_blocks: int = 0) -> int:
        self._settle(table)
        keys, full = table.keys, table.num_published
        self.stores.store_missing(table)
        self.truncate(table, num_blocks)
        kept = self.host.reach(keys, full)
        table.restore = restore = Restore(table, 0, split=kept, wanted=kept, next_read=kept)
        self.tiers.restores[restore] = None
        restore.keep(self.host, kept)
        self._wait(restore)
        self._queue_changed = True
        self.tier_stats.swapped_blocks += kept
        return kept

    def swap_or_recompute(self, table: BlockTable, num_tokens: int, others: int = 0) -> SwapDecision:
        if not (self.tiers.host_is_read and self.tiers.host_is_written):
            return SwapDecision(False, 0.0, 0.0, "recompute: the host tier has failed a moment ago")
        written = self.host.reach(table.keys, table.num_published) * self.block_size
        room = self.host.num_slots - self.staging.taken
        return swap_or_recompute(self.cost, num_tokens, min(written, num_tokens), room, others)

    # --- completions --------------------------------------------------------------------------------------------

    def poll(self, now_s: float) -> None:
        """Take what has ended, give up what has taken too long, start what has now room."""
        self.tiers.set_now(now_s)
        for operation, end in self.tiers.ended():
            match operation:
                case Store():
                    self.stores.ended(operation, end)
                case Load():
                    self._loaded(operation, end)
                case Read():
                    self.staging.ended(operation, end)
                case Write():
                    self.writes.ended(operation, end)
                case GapRead():
                    self.gaps.read_ended(operation, end)
                case GapLoad():
                    self.gaps.load_ended(operation, end)
        self._expire()
        self.staging.mend()
        self._look_ahead()
        self.writes.step()
        self._stage_deferred()
        self.staging.step()
        self.ahead.step()
        self.gaps.step()

    @property
    def busy(self) -> bool:
        """Whether polling will bring anything without another request."""
        return bool(self.tiers.under_way) or self.stores.busy or self.writes.busy

    def drain(self) -> None:
        self.ahead.seconds = 0.0
        self.host.writing.end()
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
            "host_used_blocks": len(self.host) + self.host.num_borrowed,
            "host_used_bytes": (len(self.host) + self.host.num_borrowed) * size,
            "host_evictions": self.host.evictions,
            "host_faults": self.host.faults,
            "host_is_read": self.tiers.host_is_read,
            "host_is_written": self.tiers.host_is_written,
            "host_write_back_backlog": self.host.write_back_backlog,
            "staging_blocks": self.staging.taken,
            "copies_in_flight": len(self.tiers.under_way),
        }
        if self.disk is not None:
            tiers["disk_blocks"] = self.disk.num_blocks
            tiers["disk_used_blocks"] = len(self.disk)
            tiers["disk_used_bytes"] = len(self.disk) * size
            tiers["disk_evictions"] = self.disk.evictions
            tiers["disk_faults"] = self.disk.faults
            tiers["disk_is_read"] = self.tiers.disk_is_read
            tiers["disk_is_written"] = self.tiers.disk_is_written
        return super().stats() | tiers | asdict(self.tier_stats)

    def close(self) -> None:
        self.tiers.transfer.close()

    def _loaded(self, load: Load, end: Completion) -> None:
        self._unpin(load)
        load.restore.loaded = self.tiers.count_load(load.blocks, end)

    def _expire(self) -> None:
        for restore in [restore for restore in self._timed if self.tiers.now_s >= restore.deadline_s]:
            del self._timed[restore]
            self._give_up_waiting(restore)
        late_s = self.tiers.now_s - self.wait_limit_s
        under_way = self.tiers.under_way.items()  # in the order in which they began
        for ticket in [t for t, _ in takewhile(lambda item: item[1].start_s <= late_s, under_way)]:
            operation = self.tiers.under_way.get(ticket)
            if operation is None or not self._may_be_late(operation):
                continue  # nobody needs it any more, now that another is given up; or it only waits for its turn
            self._give_up(self.tiers.cancel(ticket))
        for gap in [gap for gap in self.gaps.open if self.tiers.now_s >= gap.deadline_s]:
            self.tier_stats.expired_waits += 1
            self.gaps.expire(gap)

    def _may_be_late(self, operation: Operation) -> bool:
        """Whether something is wrong, or somebody waits."""
        if not self.tiers.transfer.in_turn or isinstance(operation, Read | Write | GapRead):
            return True
        return isinstance(operation, Load) and operation.restore.loaded is None

    def _give_up(self, operation: Operation) -> None:
        """What hangs must not keep slots or pins, nor make every later request wait for it."""
        match operation:
            case Store():
                self.stores.give_up(operation)
            case Load():
                self._unpin(operation)
                if not self.tiers.transfer.in_turn:
                    self.tiers.count_failed_load(LATE)
                self.tier_stats.expired_waits += operation.restore.loaded is None
                operation.restore.loaded = bool(operation.restore.loaded)
            case Read():
                self.staging.give_up(operation)
            case Write():
                self.writes.give_up(operation)
            case GapRead():
                self.gaps.give_up_read(operation)
            case GapLoad():
                self.gaps.give_up_load(operation)

    def _give_up_waiting(self, restore: Restore) -> None:
        if not self.staging.advance(restore):
            self.tier_stats.expired_waits += 1
            self.staging.deferred.pop(restore, None)  # what is slow now is not asked again
            self.staging.cut(restore)

    def _look_ahead(self) -> None:
        """Tell the tiers what the queue will need, where they evict by that (CachedAttention)."""
        if not self._queue_changed or not self.host.looks_ahead:
            return
        self._queue_changed = False
        chains = [(restore.table.keys, restore.wanted) for restore in self.tiers.restores]
        self.host.set_lookahead(chains)
        if self.disk is not None:
            self.disk.set_lookahead(chains)
