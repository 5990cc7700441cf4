"""What happens to requests in the scheduler, as it happens, for those who explain it (`jserve explain`).

The scheduler appends to a list and reads no clock; the engine drains the list once a step and knows the time. A step
that only decodes appends nothing.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


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
    """It is admitted, and waits for blocks that are being copied from the host."""
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
