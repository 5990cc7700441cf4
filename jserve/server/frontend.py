"""The front-end process: gRPC, health, reflection, tokenizer. It starts and watches the engine process.

Its life: find the model, load it (health says NOT_SERVING), serve, drain on SIGTERM or SIGINT, end. A signal while it
loads, or a second one, ends it at once. JAX is never imported here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jserve.config import EngineConfig, ServerConfig, describe
from jserve.console import RichProgress
from jserve.errors import ConfigError, Unavailable
from jserve.generation import Intake
from jserve.pull import DEFAULT_MODEL, resolve_model
from jserve.server import convert
from jserve.server.engine_client import REAL_ENGINE, EngineClient
from jserve.server.proto.jserve.v1 import jserve_pb2 as pb
from jserve.server.proto.jserve.v1 import jserve_pb2_grpc as pb_grpc
from jserve.server.servicer import JserveServicer, RefuseMalformed, Serving
from jserve.tokenizer import Tokenizer

_SERVICE = pb.DESCRIPTOR.services_by_name["Jserve"].full_name
_REFLECTED = (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
_SHUT_DOWN = Unavailable("the server has shut down before the answer was complete: ask another one")
_PENDING_CALLS = 1_000_000
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server would share the port in silence
    ("grpc.max_receive_message_length", convert.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),  # a client that vanished without a word is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server.max_pending_requests", _PENDING_CALLS),  # gRPC would cancel a burst beyond 1000 without a reason
    ("grpc.server.max_pending_requests_hard_limit", _PENDING_CALLS),
    ("grpc.http2.max_ping_strikes", 0),  # clients that ping during a long decode are welcome
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


def serve(config: EngineConfig, server: ServerConfig, engine: str = REAL_ENGINE) -> int:
    """Serve until a signal says to stop, which then has its usual effect (the command line's: an exit status).

    Raises the JserveError that kept or stopped it from serving.
    """
    _check_free(server.host, server.port)
    progress = RichProgress()
    for line in [*describe(server, "server."), *describe(config)]:
        progress.note(f"  {line}")
    path = resolve_model(config.model, progress)  # may download: here, where Ctrl-C simply ends it
    with asyncio.Runner() as runner:
        number = runner.run(FrontEnd(config, server, path, engine).run())
        signal.raise_signal(number)  # in here: leaving the runner waits for a tokenizer that still loads
    return 128 + number


class FrontEnd:
    """One server's life."""

    def __init__(self, config: EngineConfig, server: ServerConfig, path: Path, engine: str) -> None:
        self._config = config
        self._path = path
        self._server_config = server
        self._engine_maker = engine
        self._engine: EngineClient | None = None
        self._servicer = JserveServicer()
        self._health = health.aio.HealthServicer()
        self._told: int | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        """The number of the signal that ended it."""
        with _on_signals(self._told_to_stop):
            await self._live()
        assert self._told is not None
        return self._told

    async def _live(self) -> None:
        start_s = time.perf_counter()
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        grpc_server, port = self._bind()
        await grpc_server.start()
        try:
            found = dataclasses.replace(self._config, model=str(self._path))
            engine = self._engine = await EngineClient.start(found, self._engine_maker)
            if await self._load(engine):
                await self._say(health_pb2.HealthCheckResponse.SERVING)
                took_s = time.perf_counter() - start_s
                print(f"jserve: ready on {_address(self._server_config.host, port)} ({took_s:.1f} s)", flush=True)
                await self._until_told(engine)
            else:
                engine.kill()  # it holds nothing yet
        finally:
            await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
            if self._engine is not None:
                await self._engine.stop()
            await grpc_server.stop(grace=1.0)

    # --- start ------------------------------------------------------------------------------------------------------

    def _bind(self) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(interceptors=(RefuseMalformed(),), options=_OPTIONS)
        pb_grpc.add_JserveServicer_to_server(self._servicer, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(_REFLECTED, server)
        address = _address(self._server_config.host, self._server_config.port)
        try:
            return server, server.add_insecure_port(address)
        except RuntimeError as error:  # taken since we looked
            raise ConfigError(f"cannot listen on {address}: {error}") from None

    async def _load(self, engine: EngineClient) -> bool:
        """Make what there is to serve. False if told to stop meanwhile."""
        making = asyncio.create_task(self._make_serving(engine))
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait((making, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if making.cancel():  # it was still under way
            return False
        self._servicer.serving = making.result()
        self._servicer.refusing = None
        return True

    async def _make_serving(self, engine: EngineClient) -> Serving:
        """Tokenizer here while the engine loads there."""
        info, tokenizer = await asyncio.gather(engine.ready(), asyncio.to_thread(Tokenizer.load, self._path))
        return Serving(
            engine=engine,
            intake=Intake(tokenizer, info.vocab_size, info.max_model_len, self._config.sched.max_open),
            info=info,
            model_names=frozenset({info.model, self._config.model or DEFAULT_MODEL.name}),
        )

    # --- end --------------------------------------------------------------------------------------------------------

    def _told_to_stop(self, number: int) -> None:
        if self._told is None:
            self._told = number
            self._stop.set()
        else:
            self._hurry.set()
            if self._engine is not None:
                self._engine.cancel_all(_SHUT_DOWN)
                self._engine.kill()

    async def _until_told(self, engine: EngineClient) -> None:
        """Serve; on a signal drain; if the engine dies, raise why."""
        stopped = asyncio.create_task(self._stop.wait())
        both: list[asyncio.Future[Any]] = [stopped, engine.death]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        self._servicer.refusing = "the server is shutting down: ask another one"
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        if engine.death.done():
            stopped.cancel()
            await self._until_idle(1.0)  # the streams end by themselves: let their status out
            raise Unavailable(f"the server stops: {engine.death.result()}")
        await self._drain(engine)

    async def _drain(self, engine: EngineClient) -> None:
        timeout_s = self._server_config.drain_timeout_s
        print(f"jserve: draining, at most {timeout_s:g} s (again to stop at once)", file=sys.stderr)
        await self._until_idle(timeout_s)
        engine.cancel_all(_SHUT_DOWN)
        await self._until_idle(1.0)

    async def _until_idle(self, timeout_s: float) -> None:
        """Until no stream is under way, the time is over, or a second signal asks to hurry."""
        end_s = time.perf_counter() + timeout_s
        while self._servicer.under_way and time.perf_counter() < end_s and not self._hurry.is_set():
            await asyncio.sleep(0.05)

    async def _say(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", _SERVICE):
            await self._health.set(service, status)


@contextmanager
def _on_signals(act: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `act` on the running loop, and afterwards to whoever had them before."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, act, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_free(host: str, port: int) -> None:
    """Before anything slow. gRPC would report a port in use as well, but in several lines of its own."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem, way_out = (
                "the port is in use",
                "choose another --port (0 takes a free one), or stop the other server",
            )
        else:
            problem, way_out = error.strerror or str(error), "choose another --host or --port"
        raise ConfigError(f"cannot listen on {_address(host, port)}: {problem}; {way_out}") from None
