"""The prompts of one step: chunks within what its decodes leave of the token budget."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from jserve.sched.events import EventKind
from jserve.sched.order import Rank
from jserve.sched.plan import Row
from jserve.sched.sequence import Phase, Sequence
from jserve.sched.state import State


@dataclass(slots=True)
class Chunks:
    """What a step computes of prompts."""

    left: int
    """What the decodes leave of the token budget, and then the chunks."""
    pending: deque[Sequence]
    """Running prefills that have no chunk in this step yet, in order of rank."""
    rows: list[Row] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    """Who has become part of the batch in this step."""

    def regain(self, tokens: int) -> None:
        """Some have been preempted, and so many of them would have decoded."""
        self.left += tokens
        self.pending = deque(s for s in self.pending if s.phase is Phase.RUNNING)


def plan_prefills(state: State, chunks: Chunks, before: Rank | None = None) -> None:
    """Chunks of running prompts, or only of those that rank before another."""
    while chunks.pending and chunks.left > 0 and (before is None or chunks.pending[0].rank < before):
        plan_chunk(state, chunks, chunks.pending.popleft())


def plan_chunk(state: State, chunks: Chunks, sequence: Sequence) -> None:
    """As much of what is missing as the budget still holds, and not past a gap: it leaves the batch there."""
    start, end = sequence.num_computed, len(sequence.tokens)
    most = state.cache.computable(sequence.table, end)
    count = min(most - start, chunks.left)
    sequence.num_computed += count
    chunks.rows.append(Row(sequence, start, count, sequence.num_computed == end))
    chunks.left -= count
    state.stats.prefill_tokens += count
    state.cache.publish(sequence.table, sequence.tokens, sequence.num_computed)
    if sequence.num_computed == most < end:
        state.running.load(sequence)
        state.events.tell(EventKind.LOADING, sequence, detail=f"after {most} tokens")
