"""Real servers for the tests; the fixtures end them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the helper modules beside this one

from byte_model import write_byte_model
from running_server import HERE, Server, StartServer, end, launch

from jserve.server.client import Client


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture(scope="module")
def start_server(byte_model: Path) -> Iterator[StartServer]:
    """Starts simulated servers; all of them end with the module."""
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        servers.append(launch([str(HERE / "serve_simulated.py"), "make"], "--model", str(byte_model), *flags))
        return servers[-1]

    yield start
    for server in servers:
        end(server)


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client
