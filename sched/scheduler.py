"""The scheduler: first come, first served, continuous batching, chunked prefill, preemption by recompute.

`schedule()` fills one step within a token budget: the running decodes, then running prefill chunks, then the waiting
requests in order of arrival as long as their blocks fit. `commit()` takes the tokens of a step that has run. Between
the two, further steps may already be scheduled: a sequence whose next token is still in flight is planned as if it
goes on, and what turns out to be past its end is dropped.

Two facts keep first come, first served simple: a request that waits holds no block, and `running` is always in order
of arrival, so that its last member is the youngest and the one to preempt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from jserve.cache.kv_cache import KVCache
from jserve.sched.plan import Row, StepPlan
from jserve.sched.sequence import Phase, Sequence


@dataclass(slots=True)
class Progress:
    """News of one sequence after a step: its new token. Its phase tells whether that was the last."""

    sequence: Sequence
    token: int
    row: int
    """Place among the step's sampled tokens."""


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


class Scheduler:
    """Queues and step plans over one KV cache. Not thread-safe: the engine's thread owns it."""

    def __init__(self, cache: KVCache, *, max_running: int, token_budget: int) -> None:
        if token_budget < max_running:
            raise ValueError(f"token_budget is {token_budget}: each of {max_running} running sequences needs one")
        self.cache = cache
        self.token_budget = token_budget
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.stats = SchedStats()
        self._free_slots = list(range(max_running - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    # --- one step -----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run before a launched step has been committed."""
        plan = StepPlan()
        all_kept = self._plan_decodes(plan)
        self._plan_running_prefills(plan)
        if all_kept:
            self._admit(plan)
        if not plan.rows:
            return None
        self.stats.steps += 1
        return plan

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
        return self.stats.preemptions == preempted_before

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the sequence's blocks, preempting the youngest while that is needed; False if that was itself."""
        while not self.cache.extend(sequence.table, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        """Take everything back from a running sequence; it will be recomputed, cached blocks excepted."""
        self.running.remove(victim)
        self._leave_device(victim)
        victim.phase = Phase.WAITING
        self.stats.preemptions += 1
        self.waiting.appendleft(victim)

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
        """Waiting requests in order of arrival, until one does not fit."""
        while self.waiting and self._free_slots and plan.num_tokens < self.token_budget:
            sequence = self.waiting[0]
            # One spare block for each running request, so that its next tokens do not preempt this one at once.
            cached = self.cache.admit(sequence.table, sequence.tokens, spare=len(self.running))
            if cached is None:
                return
            self.waiting.popleft()
            sequence.phase = Phase.RUNNING
            sequence.num_computed = cached
            sequence.slot = self._free_slots.pop()
            if sequence.num_cached < 0:
                sequence.num_cached = cached
                self.stats.prompt_tokens += sequence.num_prompt
                self.stats.cached_tokens += cached
            self.running.append(sequence)
            plan.admitted.append(sequence)
            self._plan_chunk(plan, sequence)

    # --- results ------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, tokens: Seq[int]) -> list[Progress]:
        """Take the tokens that a launched step has sampled, in the order of its sampling rows."""
        news = []
        for i, row in enumerate(row for row in plan.rows if row.samples):
            sequence = row.sequence
            if sequence.phase is Phase.FINISHED:
                self.stats.overrun_tokens += 1
                continue
            token = tokens[i]
            sequence.in_flight -= 1
            sequence.tokens.append(token)
            if token in sequence.stop_token_ids and sequence.num_output > sequence.sampling.min_tokens:
                self._finish(sequence, "stop")
            elif len(sequence.tokens) >= sequence.max_tokens_total:
                self._finish(sequence, "length")
            elif sequence.phase is Phase.RUNNING:
                self.cache.publish(sequence.table, sequence.tokens, sequence.num_computed)
            news.append(Progress(sequence, token, i))
        return news

    def abort(self, sequence: Sequence) -> None:
        """End a sequence in whatever phase it is; its tokens in flight will be dropped."""
        if sequence.phase is not Phase.FINISHED:
            self._finish(sequence, "abort")

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.phase is Phase.RUNNING:
            # The KV of the newest token was never computed, or is past the end.
            known = min(sequence.num_computed, len(sequence.tokens))
            self.cache.publish(sequence.table, sequence.tokens, known)
            self.running.remove(sequence)
            self._leave_device(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason  # type: ignore[assignment]

    def _leave_device(self, sequence: Sequence) -> None:
        """Give back blocks and slot. Safe with steps in flight: the device runs them before any that reuses these."""
        self.cache.release(sequence.table)
        sequence.num_computed = 0
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
