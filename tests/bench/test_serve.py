"""`python -m bench.serve` measures a real jserve server over gRPC (with a simulated engine behind it)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.servers import Server, free_port, grpc_ready

ROOT = Path(__file__).resolve().parents[2]
SIMULATED = ROOT / "tests" / "server"
NAMED_BY_THE_ISSUE = {
    "output_tokens_per_s",
    "ttft_first_p50_s",
    "ttft_later_p50_s",
    "ttft_later_p95_s",
    "ttft_later_over_recompute",
    "tpot_p50_s",
    "tpot_p95_s",
    "cached_share",
    "host_step_ms_p50",
    "compiles_after_warmup",
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    make = f"import byte_model, pathlib; byte_model.write_byte_model(pathlib.Path({str(folder / 'model')!r}))"
    subprocess.run([sys.executable, "-c", make], cwd=SIMULATED, check=True)
    port = free_port()
    command = [
        sys.executable,
        str(SIMULATED / "serve_simulated.py"),
        "make",
        "--port",
        str(port),
        "--model",
        str(folder / "model"),
    ]
    environment = {"PYTHONPATH": str(SIMULATED)}
    server = Server.start("jserve", command, grpc_ready(f"127.0.0.1:{port}"), folder / "log", environment, timeout_s=60)
    yield f"127.0.0.1:{port}"
    server.stop()


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.serve", *words]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "200"}
    )


def test_it_reports_what_the_issue_names(target: str, tmp_path: Path) -> None:
    dialogues = tmp_path / "dialogues.jsonl"
    record = {"history": [{"user": f"word {n} " * 20, "bot": ""} for n in range(3)]}
    dialogues.write_text("\n".join(json.dumps({"history": [{"user": f"{i}"}, *record["history"]]}) for i in range(16)))
    work = ("--dialogues", str(dialogues), "--dialogues-per-user", "1", "--max-tokens", "8")
    run = bench("--target", target, "--concurrency", "2", "4", *work, "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert set(found["metrics"]) >= NAMED_BY_THE_ISSUE
    assert {f"{name}_c4" for name in NAMED_BY_THE_ISSUE - {"compiles_after_warmup"}} <= set(found["metrics"])
    assert found["metrics"]["cached_share"] > 0.3
    assert found["config"]["concurrency"] == [2, 4]
    assert "4 users" in run.stderr


def test_it_plays_any_stream_with_its_own_lengths_and_times(target: str, tmp_path: Path) -> None:
    chats, calls = tmp_path / "chats.jsonl", tmp_path / "calls.jsonl"
    chats.write_text("\n".join("[[5, 4], [3, 6], [2, 3]]" for _ in range(16)))
    times = ({"timestamp": 100 * n, "input_length": 12, "output_length": 5, "hash_ids": [0]} for n in range(16))
    calls.write_text("\n".join(map(json.dumps, times)))
    found = {}
    for work in (chats, calls):
        flags = ("--work", str(work), "--context", "64", "--compress", "50", "--dialogues-per-user", "1")
        run = bench("--target", target, "--concurrency", "2", *flags, "--json")
        assert run.returncode == 0, run.stderr
        found[work] = json.loads(run.stdout.splitlines()[-1])["metrics"]
    assert set(found[chats]) >= NAMED_BY_THE_ISSUE
    assert "ttft_later_p50_s" not in found[calls], "each is a single call"
    assert found[calls]["output_tokens_per_s"] > 0


def test_no_server_is_one_line_and_a_failure() -> None:
    run = bench("--target", "127.0.0.1:9")
    assert run.returncode == 1
    assert (
        run.stderr.strip()
        == "bench.serve: no jserve serves on 127.0.0.1:9: start one with `jserve serve`, or leave --target out"
    )
