"""Filling a step from the queue: in order of rank, past those that do not fit if the order allows that (FlashGen §4.2).

What those behind a waiting request hold counts as free for it (§4.3).
"""

from __future__ import annotations

from jserve.cache.kv_cache import Admission
from jserve.sched.events import EventKind, where
from jserve.sched.prefills import Chunks, plan_chunk, plan_prefills
from jserve.sched.sequence import Phase, Sequence, rank_of
from jserve.sched.state import State
from jserve.sched.waiting import LOOKS_PER_STEP
from jserve.sched.yielding import preempt, victims


def fill(state: State, chunks: Chunks) -> None:
    """Start whoever fits."""
    running, waiting, queue, passes = state.running, state.waiting, state.waiting.queue, state.order.passes
    waiting.look = False
    first = queue.first()
    if first is None or not (running.free_slots or running.holders[-1].rank > first.rank):
        return
    skipped: list[tuple[Sequence, int]] = []
    ahead = running.ahead(first.rank)
    rooms = running.rooms(ahead, state.cache.pool.num_free)
    room = rooms[0]
    while len(skipped) < LOOKS_PER_STEP:
        sequence = queue.first_fitting(room) if passes else queue.first()
        if sequence is None:
            break
        need, room = queue.need(sequence), rooms[running.ahead(sequence.rank) - ahead]
        if need > room:
            if passes:
                continue  # those behind it have no more room than it has
            break
        plan_prefills(state, chunks, sequence.rank)
        if chunks.left <= 0 and running.free_slots:  # without a slot, one behind it gives its own, and its token
            waiting.look = True
            break
        queue.remove(sequence)
        passed, rank = _first_before(state, sequence, skipped), sequence.rank
        if (passed is None or _may_pass(state, sequence)) and _admit(state, chunks, sequence, passed):
            ahead = running.ahead(rank)  # not of the one at which it begins a turn: those between have been looked at
            rooms = running.rooms(ahead, state.cache.pool.num_free)
            room = rooms[0]
        else:
            skipped.append((sequence, waiting.need(sequence)))
            if not passes:
                break
    else:
        waiting.look = True
    for sequence, need in skipped:
        queue.push(sequence, need)


def start_loaded(state: State) -> list[Sequence]:
    """Those whose KV has come from the host join the batch. Returns them."""
    if not state.running.num_loading:
        return []
    started = []
    for sequence in state.running.in_phase(Phase.LOADING):
        cached = state.cache.restored(sequence.table)
        if cached is not None:
            state.events.tell(EventKind.LOADED, sequence, detail=f"{cached} tokens have their KV")
            _start(state, sequence, cached)
            started.append(sequence)
    return started


def _first_before(state: State, sequence: Sequence, skipped: list[tuple[Sequence, int]]) -> Sequence | None:
    """The first that waits before it."""
    waiting = [*filter(None, [state.waiting.queue.first()]), *(s for s, _ in skipped)]
    first = min(waiting, key=rank_of, default=sequence)
    return first if first.rank < sequence.rank else None


def _may_pass(state: State, sequence: Sequence) -> bool:
    """Whether little enough would be lost if it had to yield to the one that it passes."""
    most = state.promote_tokens
    if most is None:
        return True
    cached = state.cache.num_found(sequence.table, sequence.tokens) * state.cache.block_size
    return len(sequence.tokens) - cached <= most


def _admit(state: State, chunks: Chunks, sequence: Sequence, passed: Sequence | None) -> bool:
    """Give it its blocks and a slot, others' if they have to yield; False if it does not fit after all."""
    running = state.running
    if sequence.in_flight:  # preempted a moment ago: its next token must not be sampled twice
        state.waiting.look = True
        return False
    spare = running.spare(running.ahead(sequence.rank))
    yielding = victims(state, sequence, spare)
    if yielding is None:
        return False
    if yielding:
        decodes = len(running.decodes)
        for victim in yielding:
            preempt(state, victim, sequence)
        chunks.regain(decodes - len(running.decodes))
    admission = state.cache.admit(sequence.table, sequence.tokens, spare)
    if admission is None:  # what had to yield was swapped out to where the host kept a part of its prefix
        state.waiting.look = True
        return False
    if passed is not None:
        state.stats.promotions += 1
        state.events.tell(EventKind.PROMOTED, sequence, passed)
    kind = EventKind.ADMITTED if sequence.num_cached < 0 else EventKind.RESUMED
    state.events.tell(kind, sequence, detail=_sources(admission, len(sequence.tokens)))
    state.turns.begin(sequence)
    running.enter(sequence)
    coming = admission.host_tokens + admission.disk_tokens
    if admission.loading:
        running.load(sequence)
        state.events.tell(EventKind.LOADING, sequence, detail=f"{coming} tokens from the host")
    else:
        if coming:  # they arrive in order before this step
            state.events.tell(EventKind.LOADING, sequence, detail=f"{coming} tokens from the host, before this step")
            state.events.tell(EventKind.LOADED, sequence, detail=f"{admission.num_cached} tokens have their KV")
        _start(state, sequence, admission.num_cached)
        chunks.admitted.append(sequence)
        if chunks.left > 0:
            plan_chunk(state, chunks, sequence)
    return True


def _sources(admission: Admission, tokens: int) -> str:
    """Where its KV comes from; what is not cached is computed."""
    host, disk = admission.host_tokens, admission.disk_tokens
    places = where(admission.num_cached - host - disk, host, disk)
    return f"{admission.num_cached} of {tokens} tokens are cached{places and f': {places}'}"


def _start(state: State, sequence: Sequence, cached: int) -> None:
    """From now on it is part of the batch; its leading `cached` tokens have their KV."""
    assert not sequence.in_flight, "its next token would be sampled twice"
    state.running.prefill(sequence)
    computed, sequence.num_computed = sequence.num_computed, cached
    if computed:  # up to a gap, which has been closed behind it
        sequence.num_cached += cached - computed
        state.stats.cached_tokens += cached - computed
    elif sequence.num_cached < 0:
        state.shares.serve(sequence.place)
        state.waiting_tokens -= sequence.num_prompt
        sequence.num_cached = cached
        state.stats.prompt_tokens += sequence.num_prompt
        state.stats.cached_tokens += cached
