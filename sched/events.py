"""What happens to requests in the scheduler, as it happens, for those who explain it (`jserve explain`).

The scheduler appends to a log and reads no clock; the engine drains the log once a step and knows the time. A step
that only decodes appends nothing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from jserve.sched.sequence import Sequence

MAX_EVENTS = 65536


class EventKind(StrEnum):
    ARRIVED = "arrived"
    STAGING = "staging"
    """Part of its prefix is being read from disk to the host, while it waits."""
    DEFERRED = "deferred"
    """Part of its prefix will be read once the staging region has room."""
    ADMITTED = "admitted"
    """It has its slot and its blocks for the first time."""
    PROMOTED = "promoted"
    """It is admitted before `by`, which came earlier and does not fit."""
    LOADING = "loading"
    """It is admitted, and waits for blocks that are on their way from the host; or it has been computed up to them."""
    LOADED = "loaded"
    PREEMPTED = "preempted"
    """It has given blocks back for `by`, or has none for its next token, since those before it hold them all."""
    RESUMED = "resumed"
    """It is admitted again."""
    FIRST_TOKEN = "first_token"
    FINISHED = "finished"
    REJECTED = "rejected"
    """It never joined the queue."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that happened to one request."""

    kind: EventKind
    request_id: str
    by: str | None = None
    """The request that caused it."""
    detail: str = ""
    """A few words for people: a finish reason, a mode of preemption, counts of blocks or tokens."""


def where(device: int, host: int, disk: int) -> str:
    """Tokens with KV, by the tier that has them, in words."""
    said = ((device, "on the device"), (host, "on the host"), (disk, "on disk"))
    return ", ".join(f"{tokens} {place}" for tokens, place in said if tokens)


class EventLog:
    """What has happened since somebody last took it out; without a reader the oldest events are dropped."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def __len__(self) -> int:
        return len(self._events)

    def tell(self, kind: EventKind, sequence: Sequence, by: Sequence | None = None, detail: str = "") -> None:
        """It has happened to this sequence, because of `by`."""
        if len(self._events) >= 2 * MAX_EVENTS:
            del self._events[:MAX_EVENTS]
        self._events.append(Event(kind, sequence.request_id, by.request_id if by is not None else None, detail))

    def take(self) -> list[Event]:
        """All of them, oldest first. The log is empty then."""
        taken, self._events = self._events, []
        return taken
