"""The front-end's end of the engine process: starts it, feeds it, hands out its outputs, notices its death.

Lives on the front-end's event loop. When the engine dies, every request under way gets an error as its last output.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio

from jserve import errors
from jserve.config import EngineConfig
from jserve.doors import EngineInfo
from jserve.engine_loop import (
    Abort,
    Add,
    AskHistory,
    AskStats,
    Command,
    Outputs,
    Stop,
    TellHistory,
    TellStats,
    failure,
)
from jserve.errors import JserveError, NotFound, Unavailable
from jserve.generation import Deliver
from jserve.request import EngineRequest
from jserve.server import wire
from jserve.server.wire import Failed, Ready
from jserve.timeline import History

REAL_ENGINE = "jserve.engine:Engine.from_config"
_LAST_WORDS_S = 0.5
_REAP_S = 5.0


class EngineClient:
    """An `EnginePort` to another process."""

    def __init__(self, process: asyncio.subprocess.Process, pipes: _Pipes) -> None:
        self._process = process
        self._pipes = pipes
        self._open: dict[str, Deliver | None] = {}
        """By request, who gets its outputs; None once it is aborted: until its last one comes its name is taken."""
        self._asked: dict[int, asyncio.Future[Any]] = {}
        """By ticket, what the engine is to tell."""
        self._tickets = itertools.count()
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = loop.create_future()
        self.death: asyncio.Future[JserveError] = loop.create_future()
        """Done when the engine process has ended, with why."""
        self._last_words: JserveError | None = None
        self._stopping = False
        self._tasks = [loop.create_task(self._listen()), loop.create_task(self._watch())]
        for task in self._tasks:
            task.add_done_callback(self._end_if_failed)

    @classmethod
    async def start(cls, config: EngineConfig, engine: str = REAL_ENGINE) -> EngineClient:
        """Start the process; `ready()` waits for it."""
        pipes = _Pipes()
        command = [
            sys.executable,
            "-P",  # the user's folder is no place to import from
            "-m",
            "jserve.server.engine_process",
            pipes.folder,
            wire.config_to_json(config),
            engine,
        ]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=sys.stderr,
                start_new_session=True,  # a Ctrl-C in the terminal is for the front-end, which drains first
            )
        except BaseException:
            pipes.close()
            raise
        return cls(process, pipes)

    async def ready(self) -> EngineInfo:
        """Once the engine is loaded and warm. Raises what made it fail."""
        return await asyncio.shield(self._ready)

    # --- EnginePort -------------------------------------------------------------------------------------------------

    def is_open(self, request_id: str) -> bool:
        return request_id in self._open

    def add(self, request: EngineRequest, deliver: Deliver) -> None:
        if self.death.done():
            deliver(failure(request.request_id, self.death.result()))
            return
        self._open[request.request_id] = deliver
        self._tell(Add(request))

    def abort(self, request_id: str) -> None:
        if self._open.get(request_id) is not None:
            self._open[request_id] = None
            self._tell(Abort(request_id))

    # --- the rest ---------------------------------------------------------------------------------------------------

    async def stats(self) -> dict[str, float]:
        """The engine's EngineStats, after the step that it is in."""
        told: dict[str, float] = await self._ask(AskStats)
        return told

    async def history(self, request_id: str | None = None) -> History:
        """What has happened to a request, or to all that are remembered. Raises NotFound."""
        told: History = await self._ask(lambda ticket: AskHistory(ticket, request_id))
        return told

    async def _ask(self, question: Callable[[int], Command]) -> Any:
        if self.death.done():
            raise self.death.result()
        ticket = next(self._tickets)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[ticket] = answer
        self._tell(question(ticket))
        try:
            return await answer
        finally:
            del self._asked[ticket]

    def cancel_all(self, error: JserveError) -> None:
        """End every request with an error: here for their callers, there for the engine."""
        for request_id, deliver in list(self._open.items()):
            self.abort(request_id)
            if deliver is not None:
                deliver(failure(request_id, error))

    async def stop(self, patience_s: float = 5.0) -> None:
        """End the process: in order if it is loaded and takes no longer than `patience_s`, else by force."""
        self._stopping = True
        if self._ready.done():
            self._tell(Stop())
            await self._until_ended(patience_s)
        if self._process.returncode is None:
            self.kill()
            await self._until_ended(_REAP_S)
        await asyncio.wait((self.death,), timeout=_REAP_S)
        for task in self._tasks:
            task.cancel()
        self._pipes.close()

    def kill(self) -> None:
        """End the process at once, and its children, such as a compiler: it leads a process group of its own."""
        self._stopping = True
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _until_ended(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), timeout_s)

    def _tell(self, command: Command) -> None:
        with contextlib.suppress(zmq.ZMQError):  # dying: `_watch` tells the callers
            self._pipes.commands.send(wire.encode(command), zmq.NOBLOCK)

    async def _listen(self) -> None:
        while True:
            self._take(wire.decode_event(await self._pipes.events.recv()))

    def _take(self, event: wire.Event) -> None:
        match event:
            case Outputs(outputs):
                for output in outputs:
                    ended = output.finish_reason is not None
                    deliver = self._open.pop(output.request_id, None) if ended else self._open.get(output.request_id)
                    if deliver is not None:
                        deliver(output)
            case TellStats(ticket, stats):
                self._answer(ticket, stats)
            case TellHistory(ticket, history, problem):
                self._answer(ticket, NotFound(problem) if history is None else history)
            case Ready(info):
                self._ready.set_result(info)
            case Failed(kind, message):
                self._last_words = getattr(errors, kind, Unavailable)(message)

    def _answer(self, ticket: int, told: Any) -> None:
        if (answer := self._asked.get(ticket)) is None or answer.done():  # done: whoever asked was cancelled
            return
        if isinstance(told, JserveError):
            answer.set_exception(told)
        else:
            answer.set_result(told)

    async def _watch(self) -> None:
        code = await self._process.wait()
        if code != 0 and not self._stopping:
            await asyncio.sleep(_LAST_WORDS_S)  # its last message may still be on its way
        self._release(self._last_words or Unavailable(f"the engine process {_how_it_ended(code)}"))

    def _end_if_failed(self, task: asyncio.Task[None]) -> None:
        """A defect in here would leave every stream waiting: the engine goes, and they hear of it."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        traceback.print_exception(error)
        self.kill()
        self._release(Unavailable(f"the front-end failed: {type(error).__name__}: {error}"))

    def _release(self, error: JserveError) -> None:
        """The engine is dead: nobody may wait for it."""
        if self.death.done():
            return
        self.death.set_result(error)
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # asked for, so that asyncio does not complain where nobody waits
        for future in self._asked.values():
            if not future.done():
                future.set_exception(error)
        open_, self._open = self._open, {}
        for request_id, deliver in open_.items():
            if deliver is not None:
                deliver(failure(request_id, error if isinstance(error, Unavailable) else Unavailable(str(error))))


class _Pipes:
    """Two sockets, one each way: sending on a socket that asyncio reads from would swallow its wake-ups."""

    def __init__(self) -> None:
        self.folder = _short_folder()
        self.commands: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self.events = zmq.asyncio.Context.instance().socket(zmq.PULL)
        for name, socket in ((wire.COMMANDS, self.commands), (wire.EVENTS, self.events)):
            socket.set_hwm(0)  # never waits: the servicer bounds what is under way
            socket.linger = 0
            socket.bind(wire.address(self.folder, name))

    def close(self) -> None:
        self.commands.close()
        self.events.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _short_folder() -> str:
    """A new one whose sockets have a path that the system can hold, even where TMPDIR is long."""
    usual = tempfile.gettempdir()
    fits = len(os.fsencode(f"{usual}/jserve-12345678/{wire.COMMANDS}")) <= zmq.IPC_PATH_MAX_LEN
    return tempfile.mkdtemp(prefix="jserve-", dir=usual if fits else "/tmp")


def _how_it_ended(code: int) -> str:
    if code == -9:
        return "was killed by signal 9 (out of memory, perhaps: lower --device-blocks or --memory-fraction)"
    return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
