"""Plays a workload on an engine, whichever world is behind it, and keeps a record of every call.

With the timed doors this is the simulator; with a real runner it is a benchmark without sockets. What is played, and
what is measured, is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count

from jserve.engine import Engine
from jserve.errors import InvalidRequest, Overloaded
from jserve.progress import Progress, SilentProgress
from jserve.request import EngineOutput, EngineRequest, SamplingParams
from jserve.simulation.workload import Call, Users, Workload


@dataclass(slots=True)
class CallRecord:
    """One call, timed. All times are seconds since the start."""

    session: str
    turn: int
    client: int
    prompt_tokens: int
    """The history included."""
    sent_s: float
    output_tokens: int = 0
    cached_tokens: int = 0
    first_s: float = 0.0
    end_s: float = 0.0
    refused: str = ""
    """Why it was not taken; empty if it was."""

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time for each output token after the first."""
        return (self.end_s - self.first_s) / max(1, self.output_tokens - 1)

    @property
    def normalised_s(self) -> float:
        """End-to-end latency for each output token (FlashGen §5.1, Orca, vLLM)."""
        return (self.end_s - self.sent_s) / max(1, self.output_tokens)


@dataclass
class Played:
    """What came of it."""

    work: Workload
    calls: list[CallRecord]
    """In the order in which they ended."""
    start_s: float
    end_s: float
    stats_before: Mapping[str, float]
    """The counters of engine and cache when the warm-up was over, and at the end."""
    stats_after: Mapping[str, float]
    warm_s: float = 0.0
    """When the warm-up was over."""


@dataclass
class Span:
    """Which part of a run counts, and when it ends."""

    warm_up_turns: int = 0
    """So many for each client do not count (FlashGen skips ten): of all clients together, in the order in which they
    end, so that it is the same work that counts, however long the slowest client's ten take."""
    calls: int | None = None
    """So many calls after the warm-up; None: to the end of the work."""


@dataclass
class _Open:
    call: Call
    player: object
    record: CallRecord
    tokens: list[int] = field(default_factory=list)


def play(
    engine: Engine,
    work: Workload,
    *,
    span: Span | None = None,
    progress: Progress | None = None,
    look_ahead: Callable[[Engine, float], int] = lambda engine, due_s: 1,
    users: Users | None = None,
) -> Played:
    """Play the work to its end, or to the span's.

    `look_ahead`: how many decode steps the engine may take at once, given when the next call is due; 1 for real ones.
    """
    return _Stage(engine, work, span or Span(), progress or SilentProgress(), look_ahead, users).play()


class _Stage:
    def __init__(
        self,
        engine: Engine,
        work: Workload,
        span: Span,
        progress: Progress,
        look_ahead: Callable[[Engine, float], int],
        users: Users | None,
    ) -> None:
        self._engine, self._work, self._span, self._look_ahead = engine, work, span, look_ahead
        self._users = users or Users(work, engine.info.vocab_size)
        self._progress = progress
        self._names = count()
        self._open: dict[str, _Open] = {}
        self._ended: list[CallRecord] = []
        self._counted = 0
        self._cold = self._span.warm_up_turns * (work.clients or 0)
        """Calls that have to end before any counts."""
        self._warm_s = 0.0
        self._before: dict[str, float] = {}
        self._start_s = engine.clock.now()

    def play(self) -> Played:
        engine, users = self._engine, self._users
        total = self._span.calls or self._work.num_turns
        if not self._cold:
            self._before = counters(engine)
        with self._progress.track(self._work.name, total, "") as task:
            self._task = task
            while users.has_work and not self._is_over:
                self._send()
                if engine.has_work:
                    due_s = self._start_s + users.next_s
                    for output in engine.step(self._look_ahead(engine, due_s)):
                        self._take(output)
                elif self._now_s < users.next_s:
                    engine.clock.wait(users.next_s - self._now_s)
        end_s = self._now_s
        after = counters(engine)
        for name in list(self._open):
            engine.abort(name)
        return Played(self._work, self._ended, 0.0, end_s, self._before or after, after, self._warm_s)

    @property
    def _now_s(self) -> float:
        return self._engine.clock.now() - self._start_s

    @property
    def _is_over(self) -> bool:
        return self._span.calls is not None and self._counted >= self._span.calls

    def _send(self) -> None:
        for call, player in self._users.due(self._now_s):
            record = CallRecord(call.session.id, call.turn, call.client, len(call.token_ids), call.due_s)
            sampling = SamplingParams(max_tokens=call.output_tokens, ignore_eos=True)
            name = str(next(self._names))
            try:
                self._engine.add(EngineRequest(request_id=name, token_ids=call.token_ids, sampling=sampling))
            except (InvalidRequest, Overloaded) as error:
                record.refused = str(error)
                self._end(_Open(call, player, record))
            else:
                self._open[name] = _Open(call, player, record)

    def _take(self, output: EngineOutput) -> None:
        mine = self._open.get(output.request_id)
        if mine is None:
            return
        record = mine.record
        if output.token_ids and not record.output_tokens:
            record.first_s, record.cached_tokens = self._now_s, output.cached_tokens
        record.output_tokens += len(output.token_ids)
        mine.tokens += output.token_ids
        if output.finish_reason is not None:
            del self._open[output.request_id]
            if output.finish_reason in ("error", "abort"):
                record.refused = output.error or output.finish_reason
            self._end(mine)

    def _end(self, mine: _Open) -> None:
        record, now_s = mine.record, self._now_s
        record.end_s = now_s
        self._ended.append(record)
        self._users.answered(mine.call, mine.player, mine.tokens, now_s)
        if self._cold:
            self._cold -= 1
            if not self._cold:
                self._warm_s, self._before = now_s, counters(self._engine)
        elif record.sent_s >= self._warm_s:
            self._counted += 1
            self._task.advance()


def counters(engine: Engine) -> dict[str, float]:
    """Of engine and cache."""
    from jserve.engine_loop import stats_of

    return stats_of(engine)
