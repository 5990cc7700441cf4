"""What the front-end process and the engine process say to each other: msgpack over two ZeroMQ sockets, one each way.

The engine's commands and events are those of `jserve.engine_loop`; here are the two of a process's start and end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from jserve.config import EngineConfig
from jserve.doors import EngineInfo
from jserve.engine_loop import Command, Outputs, TellHistory, TellStats


class Ready(msgspec.Struct, tag=True):
    """The engine is loaded and warm."""

    info: EngineInfo


class Failed(msgspec.Struct, tag=True):
    """The engine process ends. `kind` is the class name of the JserveError to raise."""

    kind: str
    message: str


Event = Outputs | TellStats | TellHistory | Ready | Failed

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


COMMANDS, EVENTS = "commands", "events"


def address(folder: str, name: str) -> str:
    """Of a socket in a folder that only this user can enter."""
    return f"ipc://{folder}/{name}"


def encode(message: Command | Event) -> bytes:
    return _encoder.encode(message)


def decode_command(data: bytes) -> Command:
    return _commands.decode(data)


def decode_event(data: bytes) -> Event:
    return _events.decode(data)


def config_to_json(config: EngineConfig) -> str:
    return msgspec.json.encode(config, enc_hook=str).decode()


def config_from_json(text: str) -> EngineConfig:
    return msgspec.json.decode(text, type=EngineConfig, dec_hook=_from_text)


def _from_text(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(f"cannot read {value!r} as {kind}")
