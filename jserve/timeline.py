"""What has happened to each request, and in each step: the engine's memory for `jserve explain`.

`Timelines` takes the scheduler's events as the engine drains them, once a step, and gives each the engine's time. It
remembers the last requests and the last steps only, and of one request a bounded number of events, so that a server
that runs for months holds no more of it than on its first day. It decides nothing, and shows nothing: see
`jserve.explain`. Owned by the engine's thread.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

import msgspec

from jserve.errors import NotFound
from jserve.sched.events import Event, EventKind

REMEMBERED_REQUESTS = 2048
REMEMBERED_REFUSALS = 256
"""Apart from those that ended: a flood of refused requests must not be all that is remembered."""
REMEMBERED_STEPS = 2048
EVENTS_OF_ONE = 256


class Moment(msgspec.Struct, frozen=True, omit_defaults=True):
    """An event of one request, and when it was."""

    time_s: float
    """On the engine's clock."""
    kind: str
    """One of `EventKind`."""
    by: str | None = None
    """The request that caused it."""
    detail: str = ""


class Timeline(msgspec.Struct, omit_defaults=True):
    """One request, from its arrival on."""

    request_id: str
    moments: list[Moment] = []
    forgotten: int = 0
    """Events from the middle that were too many to keep."""

    @property
    def ended(self) -> bool:
        return bool(self.moments) and self.moments[-1].kind in (EventKind.FINISHED, EventKind.REJECTED)


class StepRecord(msgspec.Struct, frozen=True, gc=False):
    """One step. Host time is what the device may have to wait for: schedule, pack and commit."""

    launched_s: float
    """When it was sent to the device, on the engine's clock; `committed_s`: when its tokens had been taken."""
    committed_s: float
    num_tokens: int
    num_rows: int
    num_decodes: int
    """Rows that decode; the others are chunks of prompts."""
    running: int
    """Requests in the batch, waiting for a place in it, and blocks free, when it was committed."""
    waiting: int
    free_blocks: int
    schedule_s: float
    pack_s: float
    commit_s: float
    steps: int = 1
    """More only in simulations, where one plan may be many decode steps."""

    @property
    def host_s(self) -> float:
        return self.schedule_s + self.pack_s + self.commit_s


class History(msgspec.Struct):
    """What is told of some requests, or of all that are remembered."""

    now_s: float
    timelines: list[Timeline]
    """In order of arrival."""
    steps: list[StepRecord]
    """Those that are remembered of the time that the timelines span, oldest first."""


class Timelines:
    """See the module. Requests under way are all remembered: the engine bounds how many there are."""

    def __init__(
        self, ended: int = REMEMBERED_REQUESTS, steps: int = REMEMBERED_STEPS, events: int = EVENTS_OF_ONE
    ) -> None:
        self.counts: Counter[str] = Counter({kind.value: 0 for kind in EventKind})
        """Events since start, by kind."""
        self.steps: deque[StepRecord] = deque(maxlen=steps)
        self._most_ended, self._most_events = ended, events
        self._open: dict[str, Timeline] = {}
        self._ended: dict[str, Timeline] = {}
        self._refused: dict[str, Timeline] = {}

    def record(self, events: Iterable[Event], now_s: float) -> None:
        """These have happened since the last call."""
        for event in events:
            self.counts[event.kind.value] += 1
            name = event.request_id
            timeline = self._open.get(name)
            if timeline is None:
                timeline = self._open[name] = Timeline(name)
            if len(timeline.moments) >= self._most_events:  # how it began and how it ended is what explains it
                del timeline.moments[self._most_events // 2]
                timeline.forgotten += 1
            timeline.moments.append(Moment(now_s, event.kind.value, event.by, event.detail))
            if timeline.ended:
                self._end(timeline)

    def _end(self, timeline: Timeline) -> None:
        name = timeline.request_id
        refused = timeline.moments[-1].kind == EventKind.REJECTED
        group, most = (self._refused, REMEMBERED_REFUSALS) if refused else (self._ended, self._most_ended)
        del self._open[name]
        for earlier in (self._refused, self._ended):  # requests of this name
            earlier.pop(name, None)
        if len(group) >= most:
            del group[next(iter(group))]
        group[name] = timeline

    def tell(self, request_id: str | None, now_s: float) -> History:
        """Of this request, or of all. The continuations of one call, NAME/0, NAME/1 and so on, are found by NAME.

        Raises NotFound for one that is not remembered.
        """
        known = {**self._refused, **self._ended, **self._open}
        if request_id is None:
            return History(now_s, sorted(known.values(), key=_begin), list(self.steps))
        found = [known[request_id]] if request_id in known else _continuations(known.values(), request_id)
        if not found:
            raise NotFound(
                f"request {request_id!r} is not remembered: those under way are, the last {self._most_ended} that have "
                f"ended, and the last {REMEMBERED_REFUSALS} that were refused; explain without an id lists them"
            )
        begin_s = min(_begin(timeline) for timeline in found)
        end_s = max(timeline.moments[-1].time_s if timeline.ended else now_s for timeline in found)
        steps = [step for step in self.steps if step.committed_s >= begin_s and step.launched_s <= end_s]
        return History(now_s, found, steps)


def _begin(timeline: Timeline) -> float:
    return timeline.moments[0].time_s


def _continuations(timelines: Iterable[Timeline], name: str) -> list[Timeline]:
    return [timeline for timeline in timelines if timeline.request_id.rpartition("/")[0] == name]
