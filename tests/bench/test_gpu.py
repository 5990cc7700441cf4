"""bench.gpu: each part fails for itself, with its reason in the result, and what it had measured is kept."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu import Done, Part

ARGUMENTS = argparse.Namespace(short=False, toy=True, seed=0)
GOOD = (
    """import json; print("words"); print(json.dumps({"metrics": {"speed": 2.0}, "missing": {"peer": "not here"}}))"""
)
STOPPED = """
import json, time
from bench.timing import stoppable
try:
    with stoppable():
        print("started", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print(json.dumps({"metrics": {"speed": 1.0}}))
"""


def part(code: str, *, has_json: bool = True) -> Part:
    return Part("part", (sys.executable, "-c", code), 60, has_json)


def test_a_part_that_ends_well_gives_its_metrics() -> None:
    done = gpu.run(part(GOOD), 60, {})
    assert done.problem == ""
    result = gpu.summary([done], ARGUMENTS)
    assert result.metrics == {"speed": 2.0}
    assert result.missing == {"peer": "not here"}


def test_a_part_that_fails_is_named_with_its_last_words() -> None:
    done = gpu.run(part("print('no kernel for this'); raise SystemExit(3)"), 60, {})
    assert done.problem == "exit code 3: no kernel for this"
    assert gpu.summary([done], ARGUMENTS).missing == {"part": done.problem}


def test_a_part_without_a_result_is_a_failure() -> None:
    assert gpu.run(part("print('[1, 2]')"), 60, {}).problem == "it printed no result"


def test_a_part_whose_time_is_over_may_still_say_what_it_has() -> None:
    done = gpu.run(part(STOPPED), 3, {})
    assert done.code is None
    assert "not finished" in done.problem
    assert done.document == {"metrics": {"speed": 1.0}}


def test_a_part_that_does_not_listen_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LAST_WORDS_S", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(60)"
    start_s = time.perf_counter()
    assert gpu.run(part(code), 1, {}).code is None
    assert time.perf_counter() - start_s < 30


def test_tests_are_counted() -> None:
    done = Done(part("", has_json=False), 1, 1.0, "...\n2 failed, 31 passed, 4 skipped in 9.1s")
    assert gpu.summary([done], ARGUMENTS).metrics == {
        "gpu_tests_failed": 2,
        "gpu_tests_passed": 31,
        "gpu_tests_skipped": 4,
    }


def test_the_parts_write_their_results_even_if_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_platform", lambda: "gpu")
    monkeypatch.setattr(gpu, "parts", lambda args: [part("raise SystemExit(1)"), part(GOOD)])
    assert gpu.main(["--out", str(tmp_path), "--label", "here"]) == 1
    summary = json.loads((tmp_path / "summary-here.json").read_text())
    assert summary["metrics"] == {"speed": 2.0}
    assert "exit code 1" in summary["missing"]["part"]
    assert json.loads((tmp_path / "part-here.json").read_text())["metrics"] == {"speed": 2.0}


def test_the_commands_are_those_of_the_benchmarks(tmp_path: Path) -> None:
    arguments = argparse.Namespace(out=tmp_path, label="x", limit_s=500, short=True, toy=False)
    tests, decode, kernels = gpu.parts(arguments)
    assert tests.command[1:5] == ("-m", "pytest", "-m", "gpu")
    assert "llama-2-13b" in decode.command
    assert "1,16,64" in decode.command
    assert {"--short", "--decode-json", "--plot"} <= set(kernels.command)


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "_platform", lambda: "cpu")
    assert gpu.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no NVIDIA GPU" in line
