"""The scheduler: first come, first served, continuous batching, chunked prefill, preemption by recompute.

`schedule()` fills one step within a token budget: the running decodes, then running prefill chunks, then the waiting
requests in order of arrival as long as their blocks fit. `commit()` takes the tokens of a step that has run. Between
the two, further steps may already be scheduled: a sequence whose next token is still in flight is planned as if it
goes on, and what turns out to be past its end is dropped.

A request whose KV is on its way from a lower tier does not hold up the others: while its blocks are being read from
disk it is passed over, and once admitted it is *loading*, outside of any batch, until its blocks are on the device
(batch-aware restoration, FlashGen §3.2.3). When it could run but those that passed it have taken its room, they give
it back. So the order of arrival is kept: `waiting`, `loading` and `running` are each in that order, what waits holds
no block, and the youngest of what holds some is the one to preempt.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import msgspec

from jserve.cache.kv_cache import KVCache
from jserve.sched.events import Event, EventKind
from jserve.sched.plan import Row, StepPlan
from jserve.sched.sequence import Phase, Sequence

MAX_EVENTS = 65536


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
    overrun_tokens: int = 0
    """Tokens computed past the end of a request, because its end was not known yet."""


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class Scheduler:
    """Queues and step plans over one KV cache. Not thread-safe: the engine's thread owns it."""

    def __init__(self, cache: KVCache, *, max_running: int, token_budget: int) -> None:
        if token_budget < max_running:
            raise ValueError(f"token_budget is {token_budget}: each of {max_running} running sequences needs one")
        self.cache = cache
        self.token_budget = token_budget
        self.waiting: deque[Sequence] = deque()
        self.loading: list[Sequence] = []
        self.running: list[Sequence] = []
        self.stats = SchedStats()
        self.events: list[Event] = []
        """What has happened since somebody last took these out; without a reader the oldest are dropped."""
        self._free_slots = list(range(max_running - 1, -1, -1))
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.loading or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        staging = self.cache.arrive(sequence.table, sequence.tokens, waiting=len(self.waiting))
        self.waiting.append(sequence)
        self._tell(EventKind.ARRIVED, sequence, detail=f"{len(sequence.tokens)} tokens")
        if staging is not None and staging.blocks:
            self._tell(EventKind.STAGING, sequence, detail=f"{staging.blocks} blocks from disk")
        if staging is not None and staging.deferred_blocks:
            self._tell(
                EventKind.DEFERRED, sequence, detail=f"{staging.deferred_blocks} blocks of disk have no room yet"
            )

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
        self._give_way()
        all_kept = self._plan_decodes(plan)
        self._plan_running_prefills(plan)
        self._start_loaded(plan)
        if all_kept:
            self._admit(plan)
        if not plan.rows:
            return None
        if max_steps > 1 and all_kept:
            self._jump(plan, max_steps)
        self.stats.steps += plan.steps
        return plan

    def _jump(self, plan: StepPlan, max_steps: int) -> None:
        """Let a plan of decodes alone span as many steps as nothing can change in, and take the blocks for them."""
        rows = plan.rows
        if len(rows) != plan.num_decodes or len(rows) != len(self.running) or self.loading:
            return
        if self._free_slots and not all(self.cache.is_ready(sequence.table) for sequence in self.waiting):
            return
        sequences = [row.sequence for row in rows]
        if any(sequence.stop_token_ids or not sequence.num_output for sequence in sequences):
            return  # one might end at any token, or has its first one still to tell
        # The plan's own step is counted in: num_computed is one ahead of what was computed before it.
        steps = min(max_steps, min(s.max_tokens_total - s.num_computed for s in sequences))
        while steps > 1 and self._blocks_missing(sequences, steps - 1) > self.cache.pool.num_free:
            steps -= 1
        more = steps - 1
        if more < 1:
            return
        plan.steps = steps
        for sequence in sequences:
            sequence.num_computed += more
            sequence.in_flight += more
            extended = self.cache.extend(sequence.table, sequence.num_computed)
            assert extended, "counted above"
        self.stats.decode_tokens += more * len(sequences)

    def _blocks_missing(self, sequences: list[Sequence], more: int) -> int:
        """Blocks that these lack to compute so many more tokens each."""
        blocks_for = self.cache.blocks_for
        return sum(max(0, blocks_for(s.num_computed + more) - len(s.table.blocks)) for s in sequences)

    def _give_way(self) -> None:
        """Whoever was passed while its KV was being read takes its turn once that is there: younger ones go back."""
        sequence = next((s for s in self.waiting if self.cache.is_ready(s.table)), None)
        while sequence is not None and (self.running or self.loading):
            victim = self._youngest()
            if victim.arrival < sequence.arrival:
                return
            if self._free_slots and self.cache.fits(sequence.table, sequence.tokens, spare=len(self.running)):
                return
            self._preempt(victim, sequence)

    def _plan_decodes(self, plan: StepPlan) -> bool:
        """One token for each running sequence that has only its newest one to compute; False if one was preempted."""
        preempted_before = self.stats.preemptions
        i = 0
        while i < len(self.running):
            sequence = self.running[i]
            total = sequence.num_tokens
            if total - sequence.num_computed == 1 and total < sequence.max_tokens_total:
                if not self._make_room(sequence, total):
                    break  # the sequence itself was the youngest
                plan.add(Row(sequence, sequence.num_computed, 1, True))
                sequence.num_computed = total
                sequence.in_flight += 1
                self.stats.decode_tokens += 1
            i += 1
        plan.num_decodes = len(plan.rows)
        return self.stats.preemptions == preempted_before

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the sequence's blocks, preempting the youngest while that is needed; False if that was itself."""
        while not self.cache.extend(sequence.table, num_tokens):
            victim = self._youngest()
            self._preempt(victim, sequence)
            if victim is sequence:
                return False
        return True

    def _youngest(self) -> Sequence:
        """Of all that hold blocks."""
        return max((group[-1] for group in (self.running, self.loading) if group), key=lambda s: s.arrival)

    def _preempt(self, victim: Sequence, by: Sequence) -> None:
        """Take everything back from a sequence; what no tier has kept of it will be computed again."""
        self._tell(EventKind.PREEMPTED, victim, by, f"recompute, {len(victim.table.blocks)} blocks given back")
        self._leave_device(victim)
        victim.phase = Phase.WAITING
        self.stats.preemptions += 1
        place = next((i for i, other in enumerate(self.waiting) if other.arrival > victim.arrival), len(self.waiting))
        self.waiting.insert(place, victim)

    def _plan_running_prefills(self, plan: StepPlan) -> None:
        for sequence in self.running:
            if plan.num_tokens >= self.token_budget:
                return
            if len(sequence.tokens) - sequence.num_computed > 0 and sequence.in_flight == 0:
                self._plan_chunk(plan, sequence)

    def _plan_chunk(self, plan: StepPlan, sequence: Sequence) -> None:
        """As much of the sequence's known, uncomputed tokens as the budget still holds."""
        missing = len(sequence.tokens) - sequence.num_computed
        count = min(missing, self.token_budget - plan.num_tokens)
        last = count == missing
        plan.add(Row(sequence, sequence.num_computed, count, last))
        sequence.num_computed += count
        if last:
            sequence.in_flight += 1
        self.stats.prefill_tokens += count
        self.cache.publish(sequence.table, sequence.tokens, sequence.num_computed)

    def _admit(self, plan: StepPlan) -> None:
        """Waiting requests in order of arrival, until one does not fit; those whose KV is still coming are passed."""
        passed: list[Sequence] = []
        while self.waiting and self._free_slots and plan.num_tokens < self.token_budget:
            sequence = self.waiting.popleft()
            if not self.cache.is_ready(sequence.table):
                passed.append(sequence)
            # Preempted in this very step, a token of it may still be in flight: then it waits for that.
            elif sequence.in_flight or not self._admit_one(plan, sequence):
                passed.append(sequence)
                break
        self.waiting.extendleft(reversed(passed))

    def _admit_one(self, plan: StepPlan, sequence: Sequence) -> bool:
        # One spare block for each running request, so that its next tokens do not preempt this one at once.
        admission = self.cache.admit(sequence.table, sequence.tokens, spare=len(self.running))
        if admission is None:
            return False
        sequence.slot = self._free_slots.pop()
        kind = EventKind.ADMITTED if sequence.num_cached < 0 else EventKind.RESUMED
        self._tell(kind, sequence, detail=f"{admission.num_cached} of {len(sequence.tokens)} tokens are cached")
        if admission.loading:
            self._tell(EventKind.LOADING, sequence)
            sequence.phase = Phase.LOADING
            insort(self.loading, sequence, key=_arrival)
        else:
            self._start(plan, sequence, admission.num_cached)
        return True

    def _start_loaded(self, plan: StepPlan) -> None:
        for sequence in list(self.loading):
            cached = self.cache.restored(sequence.table)
            if cached is not None:
                self.loading.remove(sequence)
                self._tell(EventKind.LOADED, sequence, detail=f"{cached} tokens have their KV")
                self._start(plan, sequence, cached)

    def _start(self, plan: StepPlan, sequence: Sequence, cached: int) -> None:
        """From now on it is part of the batch; its leading `cached` tokens have their KV."""
        assert not sequence.in_flight, "its next token would be sampled twice"
        sequence.phase = Phase.RUNNING
        sequence.num_computed = cached
        if sequence.num_cached < 0:
            sequence.num_cached = cached
            self.stats.prompt_tokens += sequence.num_prompt
            self.stats.cached_tokens += cached
        insort(self.running, sequence, key=_arrival)
        plan.admitted.append(sequence)
        if plan.num_tokens < self.token_budget:
            self._plan_chunk(plan, sequence)

    # --- results ------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, tokens: Seq[int]) -> list[Progress]:
        """Take the tokens that a launched step has sampled: `plan.steps` for each sampling row, row after row."""
        news = []
        steps = plan.steps
        for i, row in enumerate(row for row in plan.rows if row.samples):
            sequence = row.sequence
            if sequence.phase is Phase.FINISHED:
                self.stats.overrun_tokens += steps
                continue
            new = [*tokens[i * steps : (i + 1) * steps]]
            if sequence.num_output == 0:
                self._tell(EventKind.FIRST_TOKEN, sequence)
            sequence.in_flight -= steps
            sequence.tokens += new
            if new[-1] in sequence.stop_token_ids and sequence.num_output > sequence.sampling.min_tokens:
                self._finish(sequence, "stop")
            elif len(sequence.tokens) >= sequence.max_tokens_total:
                self._finish(sequence, "length")
            elif sequence.phase is Phase.RUNNING:
                self.cache.publish(sequence.table, sequence.tokens, sequence.num_computed)
            news.append(Progress(sequence, new, i))
        return news

    def abort(self, sequence: Sequence) -> None:
        """End a sequence in whatever phase it is; its tokens in flight will be dropped."""
        if sequence.phase is not Phase.FINISHED:
            self._finish(sequence, "abort")

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
            self.cache.release(sequence.table)
        else:
            # The KV of the newest token was never computed, or is past the end.
            known = min(sequence.num_computed, len(sequence.tokens))
            self.cache.publish(sequence.table, sequence.tokens, known)
            self._leave_device(sequence)
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason  # type: ignore[assignment]
        self._tell(EventKind.FINISHED, sequence, detail=reason)

    def _leave_device(self, sequence: Sequence) -> None:
        """Give back blocks and slot. Safe with steps in flight: the device runs them before any that reuses these."""
        (self.loading if sequence.phase is Phase.LOADING else self.running).remove(sequence)
        self.cache.release(sequence.table)
        sequence.num_computed = 0
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
