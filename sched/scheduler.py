"""The scheduler: continuous batching, chunked prefill, and an order that later requests may overtake but never delay.

`schedule()` fills one step within a token budget: one token for every running decode, then chunks of prompts.
`commit()` takes the tokens of a step that has run. Between the two, further steps may already be scheduled: a sequence
whose next token is still in flight is planned as if it goes on, and what turns out to be past its end is dropped.

Everything follows one order of ranks (`order`), and one rule: who ranks behind yields.

- The queue is filled greedily (FlashGen §4.2): where the first does not fit, later ones that do are *promoted* past it.
- What later ones hold counts as free for whoever waits before them (§4.3): as soon as a waiting request would fit into
  the free blocks and theirs, only so many of them as are needed are preempted (`victim`), and it starts. How they come
  back is a choice of its own (`preemption`).
- The preempted wait in their old places, and start again when they fit: at the soonest when one of those before them
  has ended (§4.4).
- A decode that needs a block takes it from those behind it, and from itself if there are none.

So a request waits for those before it, for its own KV on the way from disk, and for one preemption, but never for a
later request. While its KV is being read from disk it is passed over; once admitted it may be *loading*, outside of
any batch, until its blocks are on the device (batch-aware restoration, FlashGen §3.2.3).

What a step costs depends on what changes in it, not on how many wait: the queue is looked at only after something was
given back, has come or has become easier to place; a decode is touched only for its next token, unless it needs a
block (`decode_limit`) or has one to publish or an end (`news_limit`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import accumulate

import msgspec

from jserve.cache.kv_cache import KVCache
from jserve.request import FinishReason
from jserve.sched.admission import FairShares
from jserve.sched.chunk import EVERY_STEPS, STEP_TOKENS, Chunk, Pace, next_chunk
from jserve.sched.events import Event, EventKind
from jserve.sched.order import Arrival, Rank, order_named
from jserve.sched.plan import Row, StepPlan
from jserve.sched.preemption import preemption_named
from jserve.sched.queue import WaitingQueue
from jserve.sched.sequence import Phase, Sequence
from jserve.sched.victim import Holder, victim_named

MAX_EVENTS = 65536
LOOKS_PER_STEP = 32
"""Waiting requests that seem to fit and do not, before a step looks no further."""


class Progress(msgspec.Struct, gc=False):
    """News of one sequence after a step: its new tokens. Its phase tells whether they were the last."""

    sequence: Sequence
    tokens: list[int]
    """One, or as many as the plan has steps."""
    row: int
    """Place among the step's sampling rows."""


@dataclass
class SchedStats:
    """Counters since start."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of admitted requests, each counted once."""
    cached_tokens: int = 0
    """Those of them whose KV was found."""
    preemptions: int = 0
    swaps: int = 0
    """Those of them that were swapped out to the host."""
    promotions: int = 0
    """Times that a request started while another one waited before it."""
    ended_blocks: int = 0
    """Blocks that requests held when they ended."""
    overrun_tokens: int = 0
    """Tokens computed past the end of a request, because its end was not known yet."""


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank


@dataclass(slots=True)
class _Chunks:
    """The prompts of one step."""

    left: int
    """What the decodes leave of the token budget, and then the chunks."""
    pending: deque[Sequence]
    """Running prefills that have no chunk in this step yet, in order of rank."""
    rows: list[Row] = field(default_factory=list)


class Scheduler:
    """Queues and step plans over one KV cache. Not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        cache: KVCache,
        *,
        max_running: int,
        token_budget: int,
        order: str = "flashgen",
        victim: str = "youngest",
        preempt: str = "recompute",
        chunk: Chunk = "static",
        slo_ttft_s: float = 2.0,
        slo_tpot_s: float = 0.2,
        tenant_weights: Mapping[str, float] | None = None,
    ) -> None:
        if token_budget < max_running:
            raise ValueError(f"token_budget is {token_budget}: each of {max_running} running sequences needs one")
        self.cache = cache
        self.token_budget = token_budget
        self.order, self._victim, self._swaps = order_named(order), victim_named(victim), preemption_named(preempt)
        self._adaptive = chunk == "adaptive"
        self._chunk_tokens = min(STEP_TOKENS, token_budget) if self._adaptive else token_budget
        self._paced_steps = 0
        self._slo_ttft_s, self._slo_tpot_s = slo_ttft_s, slo_tpot_s
        self.shares = FairShares(tenant_weights)
        self.stats = SchedStats()
        self.events: list[Event] = []
        """What has happened since somebody last took these out; without a reader the oldest are dropped."""
        self._queue = WaitingQueue(cache.num_blocks)
        self._passed: dict[Sequence, None] = {}
        """Waiting outside of the queue: their KV is being read from disk."""
        self._look = False
        """Whether one that waits might fit that did not before."""
        self._holders: list[Sequence] = []
        """All that hold blocks, and a slot, in order of rank: loading and running ones."""
        self._prefills: list[Sequence] = []
        self._decodes: list[Sequence] = []
        """Those with another token to compute: the last one may still be in flight when none is left."""
        self._num_loading = 0
        self.waiting_tokens = 0
        """Of the prompts that have not started yet."""
        self._free_slots = list(range(max_running - 1, -1, -1))
        self._arrivals = 0

    @property
    def waiting(self) -> Seq[Sequence]:
        """In order of rank. Costs a sort: `num_waiting` does not."""
        return sorted([*self._queue, *self._passed], key=_rank)

    @property
    def num_waiting(self) -> int:
        return len(self._queue) + len(self._passed)

    @property
    def num_running(self) -> int:
        return len(self._holders) - self._num_loading

    @property
    def loading(self) -> list[Sequence]:
        return [sequence for sequence in self._holders if sequence.phase is Phase.LOADING]

    @property
    def running(self) -> list[Sequence]:
        return [sequence for sequence in self._holders if sequence.phase is Phase.RUNNING]

    @property
    def has_work(self) -> bool:
        return bool(self._holders or self._queue or self._passed)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence in its place in the queue."""
        self._arrivals += 1
        sequence.rank = self._rank_of(sequence), self._arrivals
        sequence.place = self.shares.take_place(sequence.terms.tenant, sequence.num_prompt)
        waiting, running = self.num_waiting, len(self._holders)
        staging = self.cache.arrive(sequence.table, sequence.tokens, waiting=waiting, running=running)
        self._wait(sequence)
        self.waiting_tokens += sequence.num_prompt
        self._tell(EventKind.ARRIVED, sequence, detail=f"{len(sequence.tokens)} tokens")
        if staging is not None and staging.blocks:
            self._tell(EventKind.STAGING, sequence, detail=f"{staging.blocks} blocks from disk")
        if staging is not None and staging.deferred_blocks:
            self._tell(
                EventKind.DEFERRED, sequence, detail=f"{staging.deferred_blocks} blocks of disk have no room yet"
            )

    def _rank_of(self, sequence: Sequence) -> float:
        """What the order says of a sequence that arrives now."""
        terms = sequence.terms
        return self.order.rank(
            Arrival(
                place=self.shares.place(terms.tenant),
                arrival_s=sequence.arrival_s,
                priority=terms.priority,
                slo_ttft_s=self._slo_ttft_s if terms.slo_ttft_s is None else terms.slo_ttft_s,
                prefill_s=sequence.prefill_s,
                cached_blocks=self.cache.num_found(sequence.table, sequence.tokens) if self.order.by_prefix else 0,
            )
        )

    def work_before(self, sequence: Sequence) -> tuple[float, int]:
        """What a sequence that arrives now would wait for: the predicted time of the prompts before it, in seconds,
        and the blocks that it and they lack.
        """
        rank = self._rank_of(sequence), self._arrivals + 1
        before = [s for s in (*self._queue, *self._passed) if s.rank < rank]
        prefill_s = sum(s.prefill_s for s in before)
        for running in self._prefills:
            if running.rank < rank:
                prefill_s += running.prefill_s * (1 - running.num_computed / len(running.tokens))
        needed = sum(self._queue.need(s) for s in before if s in self._queue)
        needed += self.cache.need(sequence.table, sequence.tokens)
        behind = sum(len(s.table.blocks) for s in self._holders if s.rank > rank)
        return prefill_s, max(0, needed - self.cache.pool.num_free - behind)

    def pace(self, now_s: float, tpot_s: float) -> None:
        """Once a step: the engine's time, and what a token takes now. Adaptive chunks follow it (`chunk`)."""
        self._paced_steps += 1
        if not self._adaptive or self._paced_steps % EVERY_STEPS:
            return
        first = [s for s in (*self._prefills[:1], self._queue.first()) if s is not None and not s.num_output]
        tpot_slos = [s.terms.slo_tpot_s for s in self._decodes if s.terms.slo_tpot_s is not None]
        slo_tpot_s = min(tpot_slos, default=self._slo_tpot_s)
        pace = Pace(
            running=self.num_running,
            free_share=self.cache.pool.num_free / self.cache.num_blocks,
            ttft_slack_s=min((self._due_s(s) - now_s for s in first), default=self._slo_ttft_s),
            tpot_slack_s=slo_tpot_s - tpot_s,
            slo_ttft_s=self._slo_ttft_s,
            slo_tpot_s=slo_tpot_s,
        )
        self._chunk_tokens = next_chunk(self._chunk_tokens, pace, self.token_budget)

    def _due_s(self, sequence: Sequence) -> float:
        slo_s = sequence.terms.slo_ttft_s
        return sequence.arrival_s + (self._slo_ttft_s if slo_s is None else slo_s)

    def _wait(self, sequence: Sequence) -> None:
        if self.cache.is_ready(sequence.table):
            self._queue.push(sequence, self.cache.need(sequence.table, sequence.tokens, sequence))
            self._look = True
        else:
            self._passed[sequence] = None

    def _tell(self, kind: EventKind, sequence: Sequence, by: Sequence | None = None, detail: str = "") -> None:
        if len(self.events) >= 2 * MAX_EVENTS:
            del self.events[:MAX_EVENTS]
        self.events.append(Event(kind, sequence.request_id, by.request_id if by is not None else None, detail))

    # --- one step -----------------------------------------------------------------------------------------------

    def schedule(self, max_steps: int = 1) -> StepPlan | None:
        """The next step, or None if nothing can run before a launched step has been committed.

        With `max_steps` above 1 (for simulations), the plan may span up to so many decode steps in which, unless a
        request arrives or is aborted, nothing can change: none ends before the last of them, none needs another's
        blocks, none that waits could start.
        """
        plan = StepPlan()
        self._extend_decodes()
        self._start_loaded(plan)
        decodes = len(self._decodes)
        most = max(self._chunk_tokens, min(decodes + 1, self.token_budget))
        chunks = _Chunks(most - decodes, deque(self._prefills))
        self._look_again()
        if self._look:
            self._admit(plan, chunks)
        self._plan_prefills(chunks)
        plan.rows = self._plan_decodes()
        plan.num_decodes = plan.num_tokens = len(plan.rows)
        for chunk in chunks.rows:
            plan.add(chunk)
            if chunk.samples:
                self._start_decoding(chunk.sequence)
        # One that was loaded a moment ago may have yielded to one before it since.
        plan.admitted = [*dict.fromkeys(sequence for sequence in plan.admitted if sequence.slot >= 0)]
        if not plan.rows:
            return None
        if max_steps > 1 and not chunks.rows:
            self._jump(plan, max_steps)
        self.stats.steps += plan.steps
        return plan

    def _plan_decodes(self) -> list[Row]:
        decodes = self._decodes
        rows = [Row(sequence, sequence.num_computed, 1, True) for sequence in decodes]
        for sequence in decodes:
            sequence.num_computed += 1
            sequence.in_flight += 1
        self.stats.decode_tokens += len(rows)
        return rows

    def _jump(self, plan: StepPlan, max_steps: int) -> None:
        """Let a plan of decodes alone span as many steps as nothing can change in, and take the blocks for them."""
        sequences = self._decodes
        if len(sequences) != self.num_running or self._num_loading or self._passed or self._look:
            return
        if any(sequence.stop_token_ids or not sequence.num_output for sequence in sequences):
            return  # one might end at any token, or has its first one still to tell
        # The plan's own step is counted in: num_computed is one ahead of what was computed before it.
        most = min(max_steps, min(s.max_tokens_total - s.num_computed for s in sequences)) - 1
        free = self.cache.pool.num_free
        more = bisect_right(range(1, most + 1), free, key=lambda more: self._blocks_missing(sequences, more))
        if more < 1:
            return
        plan.steps = 1 + more
        for sequence in sequences:
            sequence.num_computed += more
            sequence.in_flight += more
            if not self.cache.extend(sequence.table, sequence.num_computed):
                raise AssertionError("the blocks were counted")
            self._set_decode_limit(sequence)
        self.stats.decode_tokens += more * len(sequences)

    def _blocks_missing(self, sequences: list[Sequence], more: int) -> int:
        """Blocks that these lack to compute so many more tokens each."""
        blocks_for = self.cache.blocks_for
        return sum(max(0, blocks_for(s.num_computed + more) - len(s.table.blocks)) for s in sequences)

    # --- decodes and prefills -----------------------------------------------------------------------------------

    def _extend_decodes(self) -> None:
        """See that every decode has a place for its next token."""
        for sequence in [s for s in self._decodes if s.num_computed >= s.decode_limit]:
            if sequence.num_computed + 1 >= sequence.max_tokens_total:
                self._decodes.remove(sequence)  # its last token is in flight
            elif sequence.phase is Phase.RUNNING and self._make_room(sequence, sequence.num_computed + 1):
                self._set_decode_limit(sequence)

    def _set_decode_limit(self, sequence: Sequence) -> None:
        capacity = len(sequence.table.blocks) * self.cache.block_size
        sequence.decode_limit = min(capacity, sequence.max_tokens_total - 1)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the sequence's blocks, preempting those behind it while that is needed; False if it was itself."""
        while not self.cache.extend(sequence.table, num_tokens):
            behind = self._behind(sequence.rank)
            self._preempt(behind[0] if behind else sequence, sequence)
            if not behind:
                return False
        return True

    def _behind(self, rank: Rank) -> list[Sequence]:
        """Who holds blocks and yields to this rank, in the order in which they have to."""
        behind = self._holders[bisect_right(self._holders, rank, key=_rank) :]
        keys = {s: self._victim(Holder(s.rank, len(s.table.blocks), s.num_computed)) for s in behind}
        return sorted(behind, key=lambda sequence: keys[sequence], reverse=True)

    def _plan_prefills(self, chunks: _Chunks, before: Rank | None = None) -> None:
        """Chunks of running prompts, or only of those that rank before another."""
        while chunks.pending and chunks.left > 0 and (before is None or chunks.pending[0].rank < before):
            self._plan_chunk(chunks, chunks.pending.popleft())

    def _plan_chunk(self, chunks: _Chunks, sequence: Sequence) -> None:
        """As much of what is missing as the budget still holds."""
        missing = len(sequence.tokens) - sequence.num_computed
        count = min(missing, chunks.left)
        chunks.rows.append(Row(sequence, sequence.num_computed, count, count == missing))
        chunks.left -= count
        sequence.num_computed += count
        self.stats.prefill_tokens += count
        self.cache.publish(sequence.table, sequence.tokens, sequence.num_computed)

    def _start_decoding(self, sequence: Sequence) -> None:
        """Its last chunk is planned: with the next step come its own tokens."""
        sequence.in_flight += 1
        _discard(self._prefills, sequence)
        insort(self._decodes, sequence, key=_rank)
        self._set_decode_limit(sequence)

    # --- admission ----------------------------------------------------------------------------------------------

    def _look_again(self) -> None:
        """See who has become easier to place: blocks of its prefix are held by others now, or have come from disk."""
        woken = self.cache.index.woken
        if woken:
            for sequence in woken[:LOOKS_PER_STEP]:
                if sequence in self._queue:
                    self._queue.set_need(sequence, self.cache.need(sequence.table, sequence.tokens, sequence))
                    self._look = True
            del woken[:LOOKS_PER_STEP]
        for sequence in [s for s in self._passed if self.cache.is_ready(s.table)]:
            del self._passed[sequence]
            self._wait(sequence)

    def _admit(self, plan: StepPlan, chunks: _Chunks) -> None:
        """Start waiting requests in order of rank, past those that do not fit if the order allows that."""
        self._look = False
        first = self._queue.first()
        if first is None or not (self._free_slots or self._holders[-1].rank > first.rank):
            return
        skipped: list[tuple[Sequence, int]] = []
        ahead = self._ahead(first)
        rooms = self._rooms(ahead)
        room = rooms[0]
        while len(skipped) < LOOKS_PER_STEP:
            sequence = self._queue.first_fitting(room) if self.order.passes else self._queue.first()
            if sequence is None:
                break
            need, room = self._queue.need(sequence), rooms[self._ahead(sequence) - ahead]
            if need > room:
                if self.order.passes:
                    continue  # those behind it have no more room than it has
                break
            self._plan_prefills(chunks, sequence.rank)
            if chunks.left <= 0 and self._free_slots:  # without a slot, one behind it gives its own, and its token
                self._look = True
                break
            self._queue.remove(sequence)
            if self._admit_one(plan, chunks, sequence, skipped):
                ahead = self._ahead(sequence)
                rooms = self._rooms(ahead)
                room = rooms[0]
            else:
                skipped.append((sequence, self.cache.need(sequence.table, sequence.tokens, sequence)))
                if not self.order.passes:
                    break
        else:
            self._look = True
        for sequence, need in skipped:
            self._queue.push(sequence, need)

    def _ahead(self, sequence: Sequence) -> int:
        """Holders of blocks that rank before it, or are it."""
        return bisect_right(self._holders, sequence.rank, key=_rank)

    def _rooms(self, ahead: int) -> list[int]:
        """For those with so many holders of blocks ahead, one more, and so on: the blocks that they could have at most.

        That is the free ones and all of those behind, whose slots they can have too, but one for each ahead; or -1.
        """
        behind = self._holders[ahead:]
        blocks = [*accumulate((len(sequence.table.blocks) for sequence in reversed(behind)), initial=0)]
        free = self.cache.pool.num_free
        rooms = [free + theirs - i for i, theirs in enumerate(reversed(blocks), ahead)]
        if not self._free_slots:
            rooms[-1] = -1
        return rooms

    def _admit_one(
        self, plan: StepPlan, chunks: _Chunks, sequence: Sequence, skipped: list[tuple[Sequence, int]]
    ) -> bool:
        if sequence.in_flight:  # preempted a moment ago: its next token must not be sampled twice
            self._look = True
            return False
        # One spare block for each ahead, so that their next tokens do not preempt it at once.
        spare = self._ahead(sequence)
        victims = self._victims(sequence, spare)
        if victims is None:
            return False
        if victims:
            decodes = len(self._decodes)
            for victim in victims:
                self._preempt(victim, sequence)
            chunks.left += decodes - len(self._decodes)
            chunks.pending = deque(s for s in chunks.pending if s.phase is Phase.RUNNING)
        admission = self.cache.admit(sequence.table, sequence.tokens, spare)
        if admission is None:
            raise AssertionError(f"{sequence.request_id} fits, and is not admitted")
        sequence.slot = self._free_slots.pop()
        self._tell_promoted(sequence, skipped)
        kind = EventKind.ADMITTED if sequence.num_cached < 0 else EventKind.RESUMED
        self._tell(kind, sequence, detail=f"{admission.num_cached} of {len(sequence.tokens)} tokens are cached")
        insort(self._holders, sequence, key=_rank)
        if admission.loading:
            sequence.phase = Phase.LOADING
            self._num_loading += 1
            self._tell(EventKind.LOADING, sequence)
        else:
            self._start(plan, sequence, admission.num_cached)
            if chunks.left > 0:
                self._plan_chunk(chunks, sequence)
        return True

    def _victims(self, sequence: Sequence, spare: int) -> list[Sequence] | None:
        """As few as must yield for it to start, maybe none; None if it could not start if all behind it did."""

        def enough(victims: list[Sequence]) -> bool:
            slot = bool(self._free_slots or victims)
            return slot and self.cache.fits(sequence.table, sequence.tokens, spare, [s.table for s in victims])

        if enough([]):
            return []
        behind = self._behind(sequence.rank)
        if not behind or not enough(behind):
            return None
        low, high = 1, len(behind)
        while low < high:
            middle = (low + high) // 2
            if enough(behind[:middle]):
                high = middle
            else:
                low = middle + 1
        return behind[:low]

    def _tell_promoted(self, sequence: Sequence, skipped: list[tuple[Sequence, int]]) -> None:
        first = min([*filter(None, [self._queue.first()]), *(s for s, _ in skipped)], key=_rank, default=sequence)
        if first.rank < sequence.rank:
            self.stats.promotions += 1
            self._tell(EventKind.PROMOTED, sequence, first)

    def _start_loaded(self, plan: StepPlan) -> None:
        if not self._num_loading:
            return
        for sequence in self.loading:
            cached = self.cache.restored(sequence.table)
            if cached is not None:
                self._num_loading -= 1
                self._tell(EventKind.LOADED, sequence, detail=f"{cached} tokens have their KV")
                self._start(plan, sequence, cached)

    def _start(self, plan: StepPlan, sequence: Sequence, cached: int) -> None:
        """From now on it is part of the batch; its leading `cached` tokens have their KV."""
        assert not sequence.in_flight, "its next token would be sampled twice"
        sequence.phase = Phase.RUNNING
        sequence.num_computed = cached
        if sequence.num_cached < 0:
            self.shares.serve(sequence.place)
            self.waiting_tokens -= sequence.num_prompt
            sequence.num_cached = cached
            self.stats.prompt_tokens += sequence.num_prompt
            self.stats.cached_tokens += cached
        insort(self._prefills, sequence, key=_rank)
        plan.admitted.append(sequence)

    def _preempt(self, victim: Sequence, by: Sequence) -> None:
        """Take slot and blocks back from a sequence.

        Its full blocks stay findable until somebody takes them, the last first: no more of it is lost than is needed.
        """
        blocks = len(victim.table.blocks)
        decision = self.cache.swap_or_recompute(victim.table, victim.num_computed)
        swapped = victim.phase is Phase.RUNNING and self._swaps(decision)
        detail = f"recompute, {blocks} blocks given back"
        if swapped:
            kept = self.cache.swap_out(victim.table)
            detail = f"swap, {blocks} blocks given back, {kept} of them kept on the host"
            swapped = kept > 0
        else:
            self.cache.release(victim.table)
        self._leave_batch(victim)
        victim.phase = Phase.WAITING
        self.stats.preemptions += 1
        self.stats.swaps += swapped
        if victim is by:
            self._tell(EventKind.PREEMPTED, victim, detail=f"{detail}: none is left for its next token")
        else:
            self._tell(EventKind.PREEMPTED, victim, by, detail)
        self._wait(victim)

    # --- results ------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, tokens: Seq[int]) -> list[Progress]:
        """Take the tokens that a launched step has sampled: `plan.steps` for each sampling row, row after row."""
        rows, steps = plan.rows, plan.steps
        if len(rows) > plan.num_decodes:
            rows = [row for row in rows if row.samples]
        if steps > 1:
            return [
                Progress(row.sequence, new, i)
                for i, row in enumerate(rows)
                if self._take(row.sequence, new := [*tokens[i * steps : (i + 1) * steps]])
            ]
        news = []
        i = -1  # counted by hand: this loop is most of what a step costs
        for row, token in zip(rows, tokens, strict=True):
            i += 1
            sequence, new = row.sequence, [token]
            known = sequence.tokens
            if len(known) < sequence.news_limit and token not in sequence.stop_token_ids:
                known.append(token)
                sequence.in_flight -= 1
            elif not self._take(sequence, new):
                continue
            news.append(Progress(sequence, new, i))
        return news

    def _take(self, sequence: Sequence, new: list[int]) -> bool:
        """Append a sequence's new tokens, and do what is due then; False if it has ended before."""
        if sequence.phase is Phase.FINISHED:
            self.stats.overrun_tokens += len(new)
            return False
        known = sequence.tokens
        if len(known) == sequence.num_prompt:
            self._tell(EventKind.FIRST_TOKEN, sequence)
        sequence.in_flight -= len(new)
        known += new
        if new[-1] in sequence.stop_token_ids and sequence.num_output > sequence.sampling.min_tokens:
            self._finish(sequence, "stop")
        elif len(known) >= sequence.max_tokens_total:
            self._finish(sequence, "length")
        elif sequence.phase is Phase.RUNNING:
            self.cache.publish(sequence.table, known, sequence.num_computed)
            next_block = self.cache.block_size * (sequence.table.num_published + 1)
            sequence.news_limit = min(next_block, sequence.max_tokens_total) - 1
        return True

    def abort(self, sequence: Sequence) -> None:
        """End a sequence in whatever phase it is; its tokens in flight will be dropped."""
        if sequence.phase is not Phase.FINISHED:
            self._finish(sequence, "abort")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.phase is Phase.WAITING:
            if sequence in self._queue:
                self._queue.remove(sequence)
            else:
                del self._passed[sequence]
            self.cache.release(sequence.table)
            self._look = True  # it may have kept others waiting
        else:
            # The KV of the newest token was never computed, or is past the end.
            known = min(sequence.num_computed, len(sequence.tokens))
            self.cache.publish(sequence.table, sequence.tokens, known)
            self.stats.ended_blocks += len(sequence.table.blocks)
            self.cache.release(sequence.table)
            self._leave_batch(sequence)
        if sequence.num_cached < 0:
            self.waiting_tokens -= sequence.num_prompt
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason
        self._tell(EventKind.FINISHED, sequence, detail=reason)

    def _leave_batch(self, sequence: Sequence) -> None:
        """Give the slot back. Safe with steps in flight: the device runs them before any that reuses it."""
        for group in (self._holders, self._prefills, self._decodes):
            _discard(group, sequence)
        self._num_loading -= sequence.phase is Phase.LOADING
        sequence.num_computed = sequence.news_limit = 0
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        self._look = True


def _discard(group: list[Sequence], sequence: Sequence) -> None:
    """Take it out of a list in order of rank, if it is there."""
    at = bisect_left(group, sequence.rank, key=_rank)
    if at < len(group) and group[at] is sequence:
        del group[at]
