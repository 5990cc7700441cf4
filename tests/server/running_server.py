"""A `jserve serve` process of its own, on a free port of the loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from jserve.server.client import Client

HERE = Path(__file__).parent
START_TIMEOUT_S = 120.0


@dataclass
class Server:
    """A running `jserve serve`."""

    process: subprocess.Popen[str]
    target: str
    stderr: list[str] = field(default_factory=list)

    def client(self) -> Client:
        return Client(self.target)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout_s)

    def last_line(self) -> str:
        return self.stderr[-1].strip()

    def idle_stats(self) -> dict[str, float]:
        """The engine's stats once it has nothing left to do; fails if it never gets there."""
        with self.client() as client:
            for _ in range(200):
                stats = client.stats(timeout_s=10)
                if stats["running"] == stats["waiting"] == stats["held_blocks"] == 0:
                    return dict(stats)
                time.sleep(0.05)
        raise AssertionError(f"the engine still holds something: {stats}")


StartServer = Callable[..., Server]
"""With flags of `jserve serve`; the fixture `start_server` gives it."""


def start(script: list[str], *flags: str) -> subprocess.Popen[str]:
    """A server process that can import the modules beside this one."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, *script, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def launch(script: list[str], *flags: str) -> Server:
    """Start a server on a free port and wait for its ready line."""
    process = start(script, "--port", "0", *flags)
    server = Server(process, "")
    collect = threading.Thread(target=lambda: server.stderr.extend(process.stderr), daemon=True)
    collect.start()
    killer = threading.Timer(START_TIMEOUT_S, process.kill)
    killer.start()
    line = process.stdout.readline()
    killer.cancel()
    if not line.startswith("jserve: ready on "):
        process.wait(10)
        collect.join(5)
        raise AssertionError(f"no server: {line!r}, code {process.returncode}, {''.join(server.stderr)}")
    server.target = line.split()[3]
    return server


def end(server: Server) -> None:
    if server.process.poll() is None:
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.process.kill()
            raise
