"""Real servers for the tests: processes of their own, on free ports of the loopback, ended by the fixture."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for byte_model, and simulated_engine in this process

from byte_model import write_byte_model  # noqa: E402

from jserve.server.client import Client  # noqa: E402

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


def launch(script: list[str], *flags: str) -> Server:
    """Start a server process and wait for its ready line."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *script, "--port", "0", *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
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


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture(scope="module")
def start_server(byte_model: Path) -> Iterator[StartServer]:
    """Starts simulated servers; all of them end with the module."""
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        servers.append(launch([str(HERE / "serve_simulated.py")], "--model", str(byte_model), *flags))
        return servers[-1]

    yield start
    for server in servers:
        end(server)


def end(server: Server) -> None:
    if server.process.poll() is None:
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.process.kill()
            raise


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client
