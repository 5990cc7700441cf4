"""Servers as subprocesses: started in a session of their own, waited for, stopped for a while, measured, ended.

What a server prints goes to a log file; if it fails, the error shows the log's end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from urllib.error import URLError
from urllib.request import urlopen

POLL_S = 0.05
LOG_LINES = 15


class ServerError(Exception):
    """A server did not start, or is gone."""


@dataclass
class Server:
    """One running server and all its child processes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    ready_s: float = field(default=0.0)
    """From its start until it answered that it is ready."""

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str],
        ready: Callable[[], bool],
        log: Path,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
    ) -> Server:
        """Start it and wait until it is ready. Raises ServerError with the log's end if it ends or takes too long."""
        settings = [f"{key}={value}" for key, value in (environment or {}).items()]
        log.parent.mkdir(parents=True, exist_ok=True)
        start_s = time.perf_counter()
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["env", *settings, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = cls(name, process, log)
        try:
            while not ready():
                if process.poll() is not None:
                    raise ServerError(
                        f"{name} ended with status {process.returncode} before it was ready:\n{server.tail()}"
                    )
                if time.perf_counter() - start_s > timeout_s:
                    raise ServerError(f"{name} was not ready after {timeout_s:.0f} s:\n{server.tail()}")
                time.sleep(POLL_S)
        except BaseException:
            server.stop()
            raise
        server.ready_s = time.perf_counter() - start_s
        return server

    def pause(self) -> None:
        """Stop all its threads (SIGSTOP), so that it takes no CPU from whoever is measured next."""
        _signal(family(self.process.pid), signal.SIGSTOP)

    def resume(self) -> None:
        _signal(family(self.process.pid), signal.SIGCONT)

    def stop(self, grace_s: float = 20.0) -> None:
        """SIGTERM to the process, and SIGKILL to whatever is left of its family after the grace."""
        everyone = family(self.process.pid)
        self.resume()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        _signal(everyone, signal.SIGKILL)
        self.process.wait()

    def resident_bytes(self) -> int:
        """Resident memory of its largest process: the one with the model."""
        return max(map(_resident_bytes, family(self.process.pid)))

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])


@contextlib.contextmanager
def no_survivors() -> Iterator[None]:
    """Within this block Ctrl-C and SIGTERM end the benchmark (status 130, 143), and whatever it has started with it.

    Without it they would leave servers behind that are paused, and so can end neither by themselves nor by a signal.
    """

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        kill_descendants()
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kill_descendants() -> None:
    """SIGKILL to everything below this process. First they are stopped, so that none starts another meanwhile."""
    ours, everyone = os.getpid(), set[int]()
    while more := family(ours) - {ours} - everyone:
        _signal(more, signal.SIGSTOP)
        everyone |= more
    _signal(everyone, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def http_ready(url: str) -> Callable[[], bool]:
    """Whether a GET answers 200."""

    def ready() -> bool:
        try:
            with urlopen(url, timeout=5) as answer:
                return int(answer.status) == 200
        except (URLError, OSError):
            return False

    return ready


def grpc_ready(target: str) -> Callable[[], bool]:
    """Whether grpc.health.v1 says SERVING."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    def ready() -> bool:
        with grpc.insecure_channel(target) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return ready


def family(leader: int) -> set[int]:
    """A process and all its descendants, whatever session they moved to."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it may have just ended
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    members = {leader}
    while more := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= more
    return members


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _resident_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)
