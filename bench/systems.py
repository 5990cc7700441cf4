"""jserve as a system under test: how it is started and reached. `bench.peer_systems` has the others.

A system is started as a server of its own on a free loopback port, and gets the same cores, weights and context.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.servers import Server, free_port, grpc_ready
from bench.transports import JserveTransport, Transport

CONTEXT_TOKENS = 2048
"""Of one user: prompt and reply."""
POOL_TOKENS = 16 * CONTEXT_TOKENS
"""KV of 16 users with full contexts: about what each system is given."""


class Missing(Exception):
    """A system cannot be had on this machine, and why."""


class System(Protocol):
    """One of the compared systems."""

    @property
    def name(self) -> str:
        """As in the metrics' names."""

    @property
    def note(self) -> str:
        """What it computes in, and how it differs."""

    def prepare(self) -> Mapping[str, str]:
        """Install what it needs; its versions. Raises Missing."""

    def start(self, logs: Path, users: int) -> Server:
        """A server for up to so many users."""

    def transport(self) -> Transport:
        """To the server that was started last."""


@dataclass
class Jserve:
    """This checkout, by `jserve serve`."""

    flags: Sequence[str] = ()
    """Of `jserve serve`, besides the port."""
    name: str = "jserve"
    note: str = "float32, gRPC"
    target: str = field(default="", init=False)

    def prepare(self) -> Mapping[str, str]:
        return {}

    def start(self, logs: Path, users: int) -> Server:
        port = free_port()
        self.target = f"127.0.0.1:{port}"
        command = [sys.executable, "-P", "-m", "jserve.cli", "serve", "--port", str(port), *self.flags]
        return Server.start(self.name, command, grpc_ready(self.target), logs / f"{self.name}.log")

    def transport(self) -> JserveTransport:
        return JserveTransport(self.target)


def bench_flags(model: str | None, block_tokens: int = 8) -> list[str]:
    """The model (None: the embedded default) with a pool of POOL_TOKENS."""
    named = ["--model", model] if model else []
    return [*named, "--block-size", str(block_tokens), "--device-blocks", str(POOL_TOKENS // block_tokens)]
