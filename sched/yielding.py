"""Whoever ranks behind yields: who gives blocks back, how many of them, and what becomes of it.

Which of those behind goes first is a policy (`victim`), and so is how it comes back (`preemption`).
"""

from __future__ import annotations

from jserve.sched.events import EventKind
from jserve.sched.sequence import Phase, Sequence
from jserve.sched.state import State


def make_room(state: State, sequence: Sequence, num_tokens: int) -> bool:
    """Extend the sequence's blocks, preempting those behind it while that is needed; False if it was itself."""
    while not state.cache.extend(sequence.table, num_tokens):
        behind = state.running.behind(sequence.rank, state.victim)
        preempt(state, behind[0] if behind else sequence, sequence)
        if not behind:
            return False
    return True


def victims(state: State, sequence: Sequence, spare: int) -> list[Sequence] | None:
    """Who must yield for it to start, in the order of `victim`, and no one who need not; None if it could not start if
    all behind it did.
    """

    def enough(those: list[Sequence]) -> bool:
        slot = bool(state.running.free_slots or those)
        return slot and state.cache.fits(sequence.table, sequence.tokens, spare, [s.table for s in those])

    if enough([]):
        return []
    behind = state.running.behind(sequence.rank, state.victim)
    if not behind or not enough(behind):
        return None
    low, high = 1, len(behind)
    while low < high:
        middle = (low + high) // 2
        if enough(behind[:middle]):
            high = middle
        else:
            low = middle + 1
    # With the last one, some before it may not be needed any more.
    *others, last = chosen = behind[:low]
    others.reverse()
    tables = [other.table for other in others]
    needless = state.cache.needless(sequence.table, sequence.tokens, spare, tables, last.table)
    spared = {other for other, is_needless in zip(others, needless, strict=True) if is_needless}
    return [victim for victim in chosen if victim not in spared]


def preempt(state: State, victim: Sequence, by: Sequence) -> None:
    """Take slot and blocks back from a sequence.

    Its full blocks stay findable until somebody takes them, the last first: no more of it is lost than is needed.
    """
    blocks = len(victim.table.blocks)
    decision = state.cache.swap_or_recompute(victim.table, victim.num_computed, max(0, len(state.running) - 1))
    swapped = victim.phase is Phase.RUNNING and state.swaps(decision)
    detail = f"recompute, {blocks} blocks given back"
    if swapped:
        kept = state.cache.swap_out(victim.table)
        detail = f"swap, {blocks} blocks given back, {kept} of them kept on the host"
        swapped = kept > 0
    else:
        state.cache.release(victim.table)
    if victim.rank != victim.arrival_rank:
        detail += ", far ahead of its reader"
    state.running.leave(victim)
    state.waiting.look = True
    victim.phase = Phase.WAITING
    state.stats.preemptions += 1
    state.stats.swaps += swapped
    if victim is by:
        state.events.tell(EventKind.PREEMPTED, victim, detail=f"{detail}: none is left for its next token")
    else:
        state.events.tell(EventKind.PREEMPTED, victim, by, detail)
    state.waiting.add(victim)
