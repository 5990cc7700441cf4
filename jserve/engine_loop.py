"""The thread that owns an engine, whichever process it is in: take commands, step, tell what is new.

The engine process gives it a socket, `LLM` a queue. With nothing to do it sleeps in `receive`. The messages are plain
structs, so that they travel between processes as msgpack and between threads as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from jserve.errors import JserveError, NotFound
from jserve.request import EngineOutput, EngineRequest
from jserve.timeline import History

if TYPE_CHECKING:
    from jserve.engine import Engine


CACHE_STAT = "cache_"
"""What the names of the cache's own statistics begin with."""
EVENT_STAT = "events_"
"""What the counters of the requests' events begin with."""


class Add(msgspec.Struct, tag=True):
    request: EngineRequest


class Abort(msgspec.Struct, tag=True):
    request_id: str


class AskStats(msgspec.Struct, tag=True):
    ticket: int


class AskHistory(msgspec.Struct, tag=True):
    """What has happened to this request, or to all that are remembered."""

    ticket: int
    request_id: str | None = None


class Stop(msgspec.Struct, tag=True):
    """End every request and return."""


Command: TypeAlias = Add | Abort | AskStats | AskHistory | Stop


class Outputs(msgspec.Struct, tag=True):
    """Of one step."""

    outputs: list[EngineOutput]


class TellStats(msgspec.Struct, tag=True):
    ticket: int
    stats: dict[str, float]


class TellHistory(msgspec.Struct, tag=True):
    ticket: int
    history: History | None
    """None if the request is not remembered; `problem` says so."""
    problem: str = ""


Event: TypeAlias = Outputs | TellStats | TellHistory


class EngineLoop:
    """`receive(block)` gives the commands that have come, waiting for one if `block`; `send` never waits."""

    def __init__(
        self, engine: Engine, receive: Callable[[bool], Iterable[Command]], send: Callable[[Event], None]
    ) -> None:
        self._engine = engine
        self._receive = receive
        self._send = send

    def run(self) -> None:
        """Until `Stop`, or until the engine fails: then its exception."""
        while self._obey(self._receive(not self._engine.has_work)):
            outputs = self._engine.step() if self._engine.has_work else []
            if outputs:
                self._send(Outputs(outputs))
        self._engine.close()

    def _obey(self, commands: Iterable[Command]) -> bool:
        """False when told to stop."""
        refused = []
        for command in commands:
            match command:
                case Add(request):
                    try:
                        self._engine.add(request)
                    except JserveError as error:
                        refused.append(failure(request.request_id, error))
                case Abort(request_id):
                    self._engine.abort(request_id)
                case AskStats(ticket):
                    self._send(TellStats(ticket, stats_of(self._engine)))
                case AskHistory(ticket, request_id):
                    self._send(self._history(ticket, request_id))
                case Stop():
                    return False
        if refused:
            self._send(Outputs(refused))
        return True

    def _history(self, ticket: int, request_id: str | None) -> TellHistory:
        try:
            return TellHistory(ticket, self._engine.history(request_id))
        except NotFound as error:
            return TellHistory(ticket, None, str(error))


def stats_of(engine: Engine) -> dict[str, float]:
    """The engine's counters and, with their prefixes, its cache's and those of what happened to requests."""
    cache = {f"{CACHE_STAT}{name}": float(x) for name, x in engine.cache.stats().items()}
    events = {f"{EVENT_STAT}{kind}": float(count) for kind, count in engine.timelines.counts.items()}
    return asdict(engine.stats()) | cache | events


def failure(request_id: str, error: JserveError) -> EngineOutput:
    """The last output of a request that cannot go on."""
    details = {name: value for name, value in vars(error).items() if isinstance(value, int | float)}
    return EngineOutput(
        request_id=request_id,
        finish_reason="error",
        error=str(error),
        error_kind=type(error).__name__,
        error_details=details,
    )
