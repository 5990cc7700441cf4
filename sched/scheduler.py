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
- In the order `pace` an answer far ahead of its reader ranks last (`turns`); in all others ranks never change.
- A decode that needs a block takes it from those behind it, and from itself if there are none.

So a request waits for those before it, for its own KV on the way from disk, and for one preemption, but never for a
later request. While its KV is being read from disk it is passed over; once admitted it may be *loading*, outside of
any batch, until its blocks are on the device (batch-aware restoration, FlashGen §3.2.3).

What a step costs depends on what changes in it, not on how many wait: the queue is looked at only after something was
given back, has come or has become easier to place; a decode is touched only for its next token, unless it needs a
block (`decode_limit`) or has one to publish or an end (`news_limit`).

Where to look: `waiting` and its `queue`, `running` (who holds what), `filling` (who starts), `yielding` (who gives
way), `turns`, `prefills` and `decodes` (what a step computes), and the policies `order`, `victim`, `preemption`,
`chunk`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import msgspec

from jserve.cache.kv_cache import KVCache
from jserve.request import FinishReason
from jserve.sched.admission import FairShares
from jserve.sched.chunk import EVERY_STEPS, STEP_TOKENS, Chunk, Pace, next_chunk
from jserve.sched.decodes import extend_decodes, jump, plan_decodes, start_decoding
from jserve.sched.events import EventKind, EventLog, where
from jserve.sched.filling import fill, start_loaded
from jserve.sched.order import Arrival, order_named
from jserve.sched.plan import StepPlan
from jserve.sched.preemption import preemption_named
from jserve.sched.prefills import Chunks, plan_prefills
from jserve.sched.running import Running
from jserve.sched.sequence import Phase, Sequence
from jserve.sched.state import SchedStats, State
from jserve.sched.turns import Turns
from jserve.sched.victim import victim_named
from jserve.sched.waiting import Waiting


class Progress(msgspec.Struct, gc=False):
    """News of one sequence after a step: its new tokens. Its phase tells whether they were the last."""

    sequence: Sequence
    tokens: list[int]
    """One, or as many as the plan has steps."""
    row: int
    """Place among the step's sampling rows."""


class Scheduler:
    """Queues and step plans over one KV cache. Not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        cache: KVCache,
        *,
        max_running: int,
        token_budget: int,
        order: str = "flashgen",
        turns: Turns | None = None,
        promote_tokens: int | None = None,
        victim: str = "youngest",
        preempt: str = "recompute",
        chunk: Chunk = "static",
        slo_ttft_s: float = 2.0,
        slo_tpot_s: float = 0.2,
        tenant_weights: Mapping[str, float] | None = None,
    ) -> None:
        if token_budget < max_running:
            raise ValueError(f"token_budget is {token_budget}: each of {max_running} running sequences needs one")
        self.token_budget = token_budget
        self.state = State(
            cache,
            Running(max_running, cache.block_size),
            Waiting(cache),
            order_named(order),
            victim_named(victim),
            preemption_named(preempt),
            FairShares(tenant_weights),
            turns or Turns(),
            promote_tokens,
        )
        self._adaptive = chunk == "adaptive"
        self._chunk_tokens = min(STEP_TOKENS, token_budget) if self._adaptive else token_budget
        self._paced_steps = 0
        self._slo_ttft_s, self._slo_tpot_s = slo_ttft_s, slo_tpot_s
        self._arrivals = 0
        self._now_s = 0.0

    # --- what it holds ------------------------------------------------------------------------------------------

    @property
    def cache(self) -> KVCache:
        return self.state.cache

    @property
    def stats(self) -> SchedStats:
        return self.state.stats

    @property
    def events(self) -> EventLog:
        return self.state.events

    @property
    def shares(self) -> FairShares:
        return self.state.shares

    @property
    def waiting_tokens(self) -> int:
        """Of the prompts that have not started yet."""
        return self.state.waiting_tokens

    @property
    def waiting(self) -> Seq[Sequence]:
        """In order of rank. Costs a sort: `num_waiting` does not."""
        return [*self.state.waiting]

    @property
    def num_waiting(self) -> int:
        return len(self.state.waiting)

    @property
    def num_running(self) -> int:
        return len(self.state.running)

    @property
    def loading(self) -> list[Sequence]:
        return self.state.running.in_phase(Phase.LOADING)

    @property
    def running(self) -> list[Sequence]:
        return self.state.running.in_phase(Phase.RUNNING)

    @property
    def has_work(self) -> bool:
        return bool(self.state.running.holders) or len(self.state.waiting) > 0

    # --- arrivals -----------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence in its place in the queue."""
        self._arrivals += 1
        sequence.rank = sequence.arrival_rank = self._rank_of(sequence), self._arrivals
        sequence.place = self.shares.take_place(sequence.terms.tenant, sequence.num_prompt)
        waiting, running = self.num_waiting, len(self.state.running.holders)
        staging = self.cache.arrive(sequence.table, sequence.tokens, waiting=waiting, running=running)
        self.state.waiting.add(sequence)
        self.state.waiting_tokens += sequence.num_prompt
        tell = self.events.tell
        kept = self.cache.kept(sequence.table, sequence.tokens)
        places = where(kept.device, kept.host, kept.disk)
        tell(EventKind.ARRIVED, sequence, detail=f"{len(sequence.tokens)} tokens{places and f': {places}'}")
        if staging is not None and staging.blocks:
            tell(EventKind.STAGING, sequence, detail=f"{staging.blocks} blocks from disk")
        if staging is not None and staging.deferred_blocks:
            tell(EventKind.DEFERRED, sequence, detail=f"{staging.deferred_blocks} blocks of disk have no room yet")

    def _rank_of(self, sequence: Sequence) -> float:
        """What the order says of a sequence that arrives now."""
        terms, order = sequence.terms, self.state.order
        return order.rank(
            Arrival(
                place=self.shares.place(terms.tenant),
                arrival_s=sequence.arrival_s,
                priority=terms.priority,
                slo_ttft_s=self._slo_ttft_s if terms.slo_ttft_s is None else terms.slo_ttft_s,
                prefill_s=sequence.prefill_s,
                cached_blocks=self.cache.num_found(sequence.table, sequence.tokens) if order.by_prefix else 0,
            )
        )

    def work_before(self, sequence: Sequence) -> tuple[float, int]:
        """What a sequence that arrives now would wait for: the predicted time of the prompts before it, in seconds,
        and the blocks that it and they lack.
        """
        rank = self._rank_of(sequence), self._arrivals + 1
        running, queue = self.state.running, self.state.waiting.queue
        before = [s for s in self.state.waiting if s.rank < rank]
        prefill_s = sum(s.prefill_s for s in before)
        prefill_s += sum(s.prefill_s * (1 - s.num_computed / len(s.tokens)) for s in running.prefills if s.rank < rank)
        needed = sum(queue.need(s) for s in before if s in queue)
        needed += self.cache.need(sequence.table, sequence.tokens)
        behind = sum(len(s.table.blocks) for s in running.holders if s.rank > rank)
        return prefill_s, max(0, needed - self.cache.pool.num_free - behind)

    def pace(self, now_s: float, tpot_s: float) -> None:
        """Once a step: the engine's time, and what a token takes now. Adaptive chunks follow it."""
        self._paced_steps += 1
        if not self._adaptive or self._paced_steps % EVERY_STEPS:
            return
        running = self.state.running
        firsts = (*running.prefills[:1], self.state.waiting.queue.first())
        first = [s for s in firsts if s is not None and not s.num_output]
        tpot_slos = [s.terms.slo_tpot_s for s in running.decodes if s.terms.slo_tpot_s is not None]
        slo_tpot_s = min(tpot_slos, default=self._slo_tpot_s)
        pace = Pace(
            running=len(running),
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

    # --- a step --------------------------------------------------------------------------------------------------

    def schedule(self, max_steps: int = 1) -> StepPlan | None:
        """The next step, or None if nothing can run before a launched step has been committed.

        With `max_steps` above 1 (for simulations), the plan may span up to so many decode steps in which, unless a
        request arrives or is aborted, nothing can change: none ends before the last of them, nor its turn, none needs
        another's blocks, none that waits could start.
        """
        state = self.state
        extend_decodes(state)
        started = start_loaded(state)
        decodes = len(state.running.decodes)
        most = max(self._chunk_tokens, min(decodes + 1, self.token_budget))
        chunks = Chunks(most - decodes, deque(state.running.prefills), admitted=started)
        state.waiting.look_again()
        if state.waiting.look:
            fill(state, chunks)
        plan_prefills(state, chunks)
        plan = StepPlan(plan_decodes(state))
        plan.num_decodes = plan.num_tokens = len(plan.rows)
        for chunk in chunks.rows:
            plan.add(chunk)
            if chunk.samples:
                start_decoding(state, chunk.sequence)
        # One that was loaded a moment ago may have yielded to one before it since.
        plan.admitted = [*dict.fromkeys(sequence for sequence in chunks.admitted if sequence.slot >= 0)]
        if not plan.rows:
            return None
        if max_steps > 1 and not chunks.rows:
            jump(state, plan, max_steps)
        self.stats.steps += plan.steps
        return plan

    # --- results ------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, tokens: Seq[int], now_s: float = 0.0) -> list[Progress]:
        """Take the tokens that a launched step has sampled: `plan.steps` for each sampling row, row after row.

        `now_s`: the engine's time, when they are there; turns follow it.
        """
        self._now_s = now_s
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
            self.events.tell(EventKind.FIRST_TOKEN, sequence)
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
            if self.state.order.turns:
                self._look_at_turn(sequence)
        return True

    def _look_at_turn(self, sequence: Sequence) -> None:
        """See whether its turn is over, and come back when it will be."""
        if sequence.num_output >= sequence.turn_limit:
            slo_tpot_s = self._slo_tpot_s if sequence.terms.slo_tpot_s is None else sequence.terms.slo_tpot_s
            rank = self.state.turns.over(sequence, slo_tpot_s, self._now_s)
            if rank != sequence.rank:
                self.state.running.move(sequence, rank)
                self.state.waiting.look = True  # who waits before that may have its place
        sequence.news_limit = min(sequence.news_limit, sequence.num_prompt + sequence.turn_limit - 1)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence in whatever phase it is; its tokens in flight will be dropped."""
        if sequence.phase is not Phase.FINISHED:
            self._finish(sequence, "abort")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.phase is Phase.WAITING:
            self.state.waiting.remove(sequence)
            self.cache.release(sequence.table)
        else:
            # The KV of the newest token was never computed, or is past the end.
            known = min(sequence.num_computed, len(sequence.tokens))
            self.cache.publish(sequence.table, sequence.tokens, known)
            self.stats.ended_blocks += len(sequence.table.blocks)
            self.cache.ended(sequence.table, len(sequence.tokens), sequence.num_output)
            self.cache.release(sequence.table)
            self.state.running.leave(sequence)
            self.state.waiting.look = True
        if sequence.num_cached < 0:
            self.state.waiting_tokens -= sequence.num_prompt
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason
        self.events.tell(EventKind.FINISHED, sequence, detail=reason)
