"""How a server ends when a signal or a death meets it early: soon, with one line, and with nobody left behind."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from byte_model import write_byte_model
from running_server import HERE, StartServer, start

from jserve.config import EngineConfig, describe
from jserve.errors import Unavailable

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 0}
LAST_SETTING = describe(EngineConfig())[-1].split(" = ")[0]


@contextmanager
def loading_server(model: Path, engine: str = "make_slowly") -> Iterator[subprocess.Popen[str]]:
    """A server whose command has begun; it never gets ready."""
    process = start([str(HERE / "serve_simulated.py"), engine], "--port", "0", "--model", str(model))
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if LAST_SETTING in line:
                break
        yield process
    finally:
        process.kill()
        process.wait()


def engine_of(process: subprocess.Popen[str]) -> int:
    """The pid of the engine process, once it runs its own program."""
    for _ in range(400):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if "engine_process" in command_line(int(child)):
                return int(child)
        time.sleep(0.02)
    raise AssertionError("no engine process was started")


def command_line(pid: int) -> str:
    """Empty once the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


def assert_gone(pid: int) -> None:
    for _ in range(200):
        if not command_line(pid):
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} outlives its server")


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("delay_s", [0.0, 0.2, 0.6])
def test_a_signal_while_it_loads_ends_it_with_one_line(byte_model: Path, number: int, delay_s: float) -> None:
    with loading_server(byte_model) as process:
        time.sleep(delay_s)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (STATUS[number], "")
    assert err == f"jserve: ended by {signal.Signals(number).name}\n"


@pytest.mark.parametrize("pause_s", [0.0, 0.05, 0.2])
def test_a_second_signal_while_it_loads_changes_nothing(byte_model: Path, pause_s: float) -> None:
    with loading_server(byte_model) as process:
        engine = engine_of(process)
        process.send_signal(signal.SIGINT)
        time.sleep(pause_s)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "jserve: ended by SIGINT\n")
    assert_gone(engine)


def test_a_tokenizer_that_never_loads_does_not_keep_it(tmp_path: Path) -> None:
    model = write_byte_model(tmp_path / "model")
    (model / "tokenizer_config.json").unlink(missing_ok=True)
    os.mkfifo(model / "tokenizer_config.json")  # nobody ever writes to it
    with loading_server(model) as process:
        engine = engine_of(process)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "jserve: ended by SIGTERM\n")
    assert_gone(engine)


def test_a_job_in_the_background_of_a_script_can_be_interrupted(byte_model: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells start them; it is inherited
    try:
        server = loading_server(byte_model)
        process = server.__enter__()
    finally:
        signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    server.__exit__(None, None, None)
    assert (process.returncode, err) == (130, "jserve: ended by SIGINT\n")


def test_a_second_signal_ends_a_drain_at_once(start_server: StartServer) -> None:
    server = start_server("--drain-timeout", "100")
    engine = engine_of(server.process)
    with server.client() as client, client.generate("drain", max_tokens=900, stream=True) as stream:
        next(stream)
        server.signal(signal.SIGINT)
        time.sleep(0.1)
        server.signal(signal.SIGINT)
        with pytest.raises(Unavailable, match="shut down before the answer was complete"):
            stream.result()
    assert server.wait() == 130
    assert_gone(engine)


@pytest.mark.parametrize("delay_s", [0.0, 0.2])
def test_an_engine_that_is_killed_while_it_loads_is_told(byte_model: Path, delay_s: float) -> None:
    with loading_server(byte_model) as process:
        engine = engine_of(process)
        time.sleep(delay_s)
        os.kill(engine, signal.SIGKILL)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("jserve: the engine process was killed by signal 9 (out of memory, perhaps")
    assert err.count("\n") == 1


@pytest.mark.parametrize("delay_s", [0.0, 0.2])
def test_a_front_end_that_is_killed_while_it_loads_leaves_no_engine(byte_model: Path, delay_s: float) -> None:
    with loading_server(byte_model) as process:
        engine = engine_of(process)
        time.sleep(delay_s)
        pipes = Path(command_line(engine).split("\0")[4])
        assert pipes.is_dir()
        process.kill()
        process.wait()
    assert_gone(engine)
    assert not pipes.exists()


def test_what_the_engine_has_started_goes_with_it(byte_model: Path) -> None:
    with loading_server(byte_model, "make_with_a_compiler") as process:
        compiler = int(re.search(r"compiler (\d+)", process.stderr.readline())[1])
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0
    assert_gone(compiler)


def test_an_engine_is_missed_though_its_compiler_lives_on(byte_model: Path) -> None:
    with loading_server(byte_model, "make_with_a_compiler") as process:
        compiler = int(re.search(r"compiler (\d+)", process.stderr.readline())[1])
        os.kill(engine_of(process), signal.SIGKILL)
        try:
            process.wait(20)
        finally:
            os.kill(compiler, signal.SIGKILL)
    assert process.returncode == 2


def test_the_terminal_has_its_cursor_back(byte_model: Path) -> None:
    ours, theirs = pty.openpty()
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(HERE / "serve_simulated.py"), "make_with_a_bar", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--model", str(byte_model)],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": path, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    try:
        while b"\x1b[?25l" not in shown:  # the engine's bar hides the cursor
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # the terminal's other end is closed
            pass
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert shown.splitlines()[-1] == b"jserve: ended by SIGINT"
