"""A server under test is waited for, stopped and continued, and ends with all its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.noise import Noise
from bench.servers import Server, ServerError, free_port, http_ready

SERVE = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("child", child.pid, flush=True)
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok).serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    port = free_port()
    ready = http_ready(f"http://127.0.0.1:{port}/health")
    started = Server.start(
        "small", [sys.executable, "-c", SERVE, str(port)], ready, tmp_path / "small.log", timeout_s=30
    )
    yield started
    started.stop()


def state(pid: int) -> str:
    """As the kernel calls it: S sleeping, T stopped, Z ended; gone if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


def settles(pid: int, states: str) -> bool:
    deadline = time.monotonic() + 10
    while state(pid) not in states and time.monotonic() < deadline:
        time.sleep(0.01)
    return state(pid) in states


def child_of(server: Server) -> int:
    return int(server.log.read_text().split()[1])


def test_it_is_ready_when_it_says_so_and_has_memory(server: Server) -> None:
    assert server.ready_s > 0
    assert server.resident_bytes() > 1 << 20


def test_paused_means_all_of_it_even_children_in_sessions_of_their_own(server: Server) -> None:
    server.pause()
    assert settles(child_of(server), "T")
    assert settles(server.process.pid, "T")
    server.resume()
    assert settles(child_of(server), "S")


def test_a_paused_server_can_be_ended_with_its_children(server: Server) -> None:
    child = child_of(server)
    server.pause()
    server.stop()
    assert server.process.returncode is not None
    assert settles(child, "Z gone")


def test_what_a_server_and_we_take_is_not_noise(server: Server) -> None:
    noise = Noise(server)
    deadline = time.process_time() + 0.3
    while time.process_time() < deadline:
        pass
    assert 0 <= noise.others_cores() <= (os.cpu_count() or 1)


def test_a_server_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    code = "import os, sys; print('no', os.getcwd() and 'such model'); sys.exit(3)"
    with pytest.raises(ServerError, match=r"(?s)broken ended with status 3 .*no such model"):
        Server.start("broken", [sys.executable, "-c", code], lambda: False, tmp_path / "log")


def test_a_server_that_never_is_ready_is_ended(tmp_path: Path) -> None:
    pids: list[int] = []

    def never() -> bool:
        pids.extend(int(p) for p in (tmp_path / "log").read_text().split())
        return False

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(ServerError, match="was not ready after 1 s"):
        Server.start("slow", [sys.executable, "-c", code], never, tmp_path / "log", timeout_s=1)
    assert settles(pids[0], "gone")


def test_the_environment_is_what_was_given_besides_ours(tmp_path: Path) -> None:
    code = "import os, time; print(os.environ['MARK'], os.environ['PATH'], flush=True); time.sleep(60)"
    log = tmp_path / "log"
    started = Server.start("env", [sys.executable, "-c", code], lambda: bool(log.read_text()), log, {"MARK": "here"})
    started.stop()
    assert log.read_text().split() == ["here", *os.environ["PATH"].split()]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_benchmark_with_its_paused_servers_and_their_children(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    (tmp_path / "serve.py").write_text(SERVE)
    program = f"""
        import sys, time
        from pathlib import Path
        from bench.servers import Server, free_port, http_ready, no_survivors
        with no_survivors():
            port, log = free_port(), Path({str(tmp_path / "log")!r})
            command = [sys.executable, {str(tmp_path / "serve.py")!r}, str(port)]
            server = Server.start("small", command, http_ready(f"http://127.0.0.1:{{port}}"), log, timeout_s=30)
            server.pause()
            print(server.process.pid, log.read_text().split()[1], flush=True)
            try:
                time.sleep(60)
            finally:
                server.stop()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    benchmark = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert benchmark.stdout is not None
    pids = [int(pid) for pid in benchmark.stdout.readline().split()]
    assert len(pids) == 2
    assert all(settles(pid, "T") for pid in pids)
    benchmark.send_signal(number)
    assert benchmark.wait(20) == status
    assert all(settles(pid, "gone") for pid in pids)
    benchmark.stdout.close()
