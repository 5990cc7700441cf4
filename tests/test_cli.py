"""The `jserve` command: quick to ask, clear when wrong, clean on stdout."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jserve import cli
from jserve.config import CacheConfig, EngineConfig, ServerConfig
from jserve.settings import build, settings_of

FIXTURE = Path(__file__).parent / "fixtures" / "models" / "smollm2"


def jserve(*args: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jserve.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)


def test_help_does_not_import_a_model_runtime() -> None:
    program = (
        "import sys; from jserve.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: print([m for m in ('jax', 'grpc', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_setting_is_a_flag_with_help() -> None:
    shown = jserve("serve", "--help").stdout
    for setting in [*settings_of(EngineConfig), *settings_of(ServerConfig)]:
        flag = setting.name.removesuffix("_s").replace("_", "-")
        assert f"--no-{flag}" in shown if setting.default is True else f"--{flag}" in shown
        assert setting.help, f"{setting.name} has no docstring"


def test_flags_become_the_configuration() -> None:
    flags = (
        "--model M --dtype bfloat16 --tp 3 --max-model-len 99 --block-size 8 --device-blocks 7 --memory-fraction 0.5"
    )
    flags += " --max-running 5 --token-budget 64 --max-waiting 6 --attention-backend xla"
    flags += (
        " --order fcfs --turn-tokens 55 --ahead 12 --victim largest --preempt auto --chunk adaptive --admission queue"
    )
    flags += " --promote-tokens 77 --max-waiting-tokens 999 --tenant-weights a=2,b=0.5 --slo-ttft 3 --slo-tpot 0.1"
    flags += (
        " --host-gib 2 --disk-dir /d --disk-gib 3 --staging-gib 0.5 --restore cost --eviction fifo --load-timeout 4"
        " --read-ahead 0.2"
    )
    flags += " --token-buckets 16,64 --no-overlap --no-warmup --compile-cache-dir /c --port 1 --drain-timeout 2.5"
    flags += " --profile-dir /p --profile-skip 7 --profile-steps 8"
    args = vars(cli._parser().parse_args(["serve", *flags.split()]))
    engine, server = build(EngineConfig, args), build(ServerConfig, args)
    assert (engine.model, engine.dtype, engine.tp, engine.max_model_len) == ("M", "bfloat16", 3, 99)
    assert dataclasses.astuple(engine.cache) == (8, 7, 0.5, True, True, 2.0, "/d", 3.0, 0.5, "cost", "fifo", 0.2, 4.0)
    assert dataclasses.astuple(engine.sched)[:6] == (5, 64, 6, 999, "queue", ("a=2", "b=0.5"))
    assert dataclasses.astuple(engine.sched)[6:] == (3.0, 0.1, "fcfs", 55, 12.0, 77, "largest", "auto", "adaptive")
    assert dataclasses.astuple(engine.runner) == ("xla", (16, 64), False, False, Path("/c"), Path("/p"), 7, 8)
    assert (server.port, server.drain_timeout_s) == (1, 2.5)
    assert not build(CacheConfig, vars(cli._parser().parse_args(["serve", "--no-prefix-cache"]))).prefix_cache


def test_without_flags_the_configuration_is_the_default() -> None:
    args = vars(cli._parser().parse_args(["serve"]))
    assert (build(EngineConfig, args), build(ServerConfig, args)) == (EngineConfig(), ServerConfig())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["serve", "--model", "nowhere"], "model 'nowhere' is not here"),
        (["serve", "--tp", "0"], "tp is 0"),
        (["serve", "--port", "70000"], "server.port is 70000"),
        (["serve", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["pull", "nowhere"], "model 'nowhere' is not here"),
        (["chat", "--model", "nowhere", "-m", "hi"], "model 'nowhere' is not here"),
        (["chat", "--target", "127.0.0.1:1", "-m", "hi"], "Connection refused"),
        (["convert", "/tmp/x", "--model", "nowhere"], "model 'nowhere' is not here"),
        (["convert", "/dev/null/x", "--model", str(FIXTURE)], "/dev/null"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(args: list[str], said: str) -> None:
    done = jserve(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("jserve: ")
    assert said in last
    assert "Traceback" not in done.stderr


def test_pull_prints_where_the_model_is() -> None:
    done = jserve("pull", str(FIXTURE))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{FIXTURE}\n", "")


def test_convert_writes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    from jserve import checkpoints
    from jserve.runner import make_mesh

    source, target = tmp_path / "source", tmp_path / "converted"
    shutil.copytree(FIXTURE, source)
    done = jserve("convert", str(target), "--model", str(source), "--dtype", "float32", timeout_s=120)
    assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
    assert checkpoints.load(target, mesh=make_mesh(1), dtype="float32").spec.vocab_size == 128
    again = jserve("convert", str(target), "--model", str(source), timeout_s=120)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_ctrl_c_ends_a_command_without_a_traceback(tmp_path: Path) -> None:
    fifo = tmp_path / "tokenizer_config.json"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "jserve.cli", "chat", "--model", str(tmp_path), "-m", "hi"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer = open_when_read(fifo)  # and never written to: the command now waits for its model
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    os.close(writer)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err


def open_when_read(fifo: Path) -> int:
    """The fifo's other end, once somebody reads it."""
    for _ in range(600):
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.05)
    raise AssertionError("nobody reads the fifo")
