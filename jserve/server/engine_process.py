"""The engine process: `python -m jserve.server.engine_process FOLDER CONFIG ENGINE`, started by the front-end.

It owns the engine and nothing else: token ids in, token ids out. It lives no longer than the process that started it,
which holds the other end of its standard input.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import zmq

from jserve.config import EngineConfig
from jserve.console import RichProgress
from jserve.engine_loop import Command, EngineLoop
from jserve.errors import JserveError
from jserve.server import wire

if TYPE_CHECKING:
    from jserve.engine import Engine
    from jserve.progress import Progress

EngineMaker = Callable[[EngineConfig, "Progress"], "Engine"]


def main(folder: str, config: str, engine: str) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):  # a service manager sends them to all: the front-end drains first
        signal.signal(number, signal.SIG_IGN)
    parent = os.dup(sys.stdin.fileno())  # ours alone: a child of ours that held it would hide our end from the parent
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    threading.Thread(target=_die_with, args=(parent, folder), name="parent-watch", daemon=True).start()
    with zmq.Context() as context, context.socket(zmq.PULL) as commands, context.socket(zmq.PUSH) as events:
        for name, socket in ((wire.COMMANDS, commands), (wire.EVENTS, events)):
            socket.set_hwm(0)  # the front-end bounds what is under way; here nothing may be dropped or wait
            socket.connect(wire.address(folder, name))

        def send(event: wire.Event) -> None:
            events.send(wire.encode(event))

        try:
            made = _maker(engine)(wire.config_from_json(config), RichProgress())
            send(wire.Ready(made.info))
            EngineLoop(made, lambda block: _receive(commands, block), send).run()
        except JserveError as error:
            send(wire.Failed(type(error).__name__, str(error)))
            return 1
        except OSError as error:  # a full disk, a folder that is not ours: for the user, as it is
            send(wire.Failed("JserveError", str(error)))
            return 1
        except Exception as error:
            traceback.print_exc()  # a defect of ours: whoever runs the server can report it
            send(wire.Failed("Unavailable", f"the engine failed: {type(error).__name__}: {error}"))
            return 1
    return 0


def _maker(name: str) -> EngineMaker:
    """`module:attribute.attribute`, so that tests can serve a simulated engine."""
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found  # type: ignore[return-value]


def _receive(socket: zmq.Socket[bytes], block: bool) -> Iterator[Command]:
    if block:
        yield wire.decode_command(socket.recv())
    while True:
        try:
            yield wire.decode_command(socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return


def _die_with(parent: int, folder: str) -> None:
    """Reading ends when the parent does, however it does: no orphan keeps the device, and the sockets go."""
    while os.read(parent, 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
