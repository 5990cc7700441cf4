"""Decodes in a step: a place for everybody's next token, a row each, and, for simulations, many steps in one plan.

A decode is touched only for its next token, unless it needs a block or has computed its last (`decode_limit`).
"""

from __future__ import annotations

from bisect import bisect_right

from jserve.sched.plan import Row, StepPlan
from jserve.sched.sequence import Phase, Sequence
from jserve.sched.state import State
from jserve.sched.yielding import make_room


def extend_decodes(state: State) -> None:
    """See that every decode has a place for its next token."""
    decodes = state.running.decodes
    for sequence in [s for s in decodes if s.num_computed >= s.decode_limit]:
        if sequence.num_computed + 1 >= sequence.max_tokens_total:
            decodes.remove(sequence)  # its last token is in flight
        elif sequence.phase is Phase.RUNNING and make_room(state, sequence, sequence.num_computed + 1):
            _set_decode_limit(state, sequence)


def start_decoding(state: State, sequence: Sequence) -> None:
    """Its last chunk is planned: with the next step come its own tokens."""
    sequence.in_flight += 1
    state.running.decode(sequence)
    _set_decode_limit(state, sequence)


def _set_decode_limit(state: State, sequence: Sequence) -> None:
    capacity = len(sequence.table.blocks) * state.cache.block_size
    sequence.decode_limit = min(capacity, sequence.max_tokens_total - 1)


def plan_decodes(state: State) -> list[Row]:
    decodes = state.running.decodes
    rows = [Row(sequence, sequence.num_computed, 1, True) for sequence in decodes]
    for sequence in decodes:
        sequence.num_computed += 1
        sequence.in_flight += 1
    state.stats.decode_tokens += len(rows)
    return rows


def jump(state: State, plan: StepPlan, max_steps: int) -> None:
    """Let a plan of decodes alone span as many steps as nothing can change in, and take the blocks for them."""
    sequences = state.running.decodes
    if len(sequences) != len(state.running) or state.running.num_loading or state.waiting.reading or state.waiting.look:
        return
    if any(sequence.stop_token_ids or not sequence.num_output for sequence in sequences):
        return  # one might end at any token, or has its first one still to tell
    # The plan's own step is counted in: num_computed is one ahead of what was computed before it.
    most = min(max_steps, min(s.max_tokens_total - s.num_computed for s in sequences)) - 1
    if state.order.turns:  # ranks are to be right when the next one arrives
        most = min(most, min(s.turn_limit - (s.num_tokens - s.num_prompt) for s in sequences))
    free = state.cache.pool.num_free
    more = bisect_right(range(1, most + 1), free, key=lambda more: _blocks_missing(state, sequences, more))
    if more < 1:
        return
    plan.steps = 1 + more
    for sequence in sequences:
        sequence.num_computed += more
        sequence.in_flight += more
        if not state.cache.extend(sequence.table, sequence.num_computed):
            raise AssertionError("the blocks were counted")
        _set_decode_limit(state, sequence)
    state.stats.decode_tokens += more * len(sequences)


def _blocks_missing(state: State, sequences: list[Sequence], more: int) -> int:
    """Blocks that these lack to compute so many more tokens each."""
    blocks_for = state.cache.blocks_for
    return sum(max(0, blocks_for(s.num_computed + more) - len(s.table.blocks)) for s in sequences)
