"""A benchmark's last line of output is one JSON object that says what was measured, on what, with what."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench import report
from bench.report import Result, emit, table

RESULT = Result("speed", {"tokens_per_s": 12.3456789, "count": 3}, {"users": 8}, seed=5, missing={"other": "not here"})


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return parser.parse_args(words)


def test_the_last_line_is_one_object_with_all_there_is_to_know(capsys: pytest.CaptureFixture[str]) -> None:
    report.console(arguments("--json")).print(table("a table", ["", "8 users"], [["tokens", 1.0]]))
    emit(RESULT, arguments("--json"))
    shown = capsys.readouterr()
    (line,) = shown.out.splitlines()
    found = json.loads(line)
    assert set(found) == {"bench", "metrics", "missing", "config", "machine", "versions", "commit", "seed"}
    assert found["metrics"] == {"tokens_per_s": 12.346, "count": 3}
    assert found["missing"] == {"other": "not here"}
    assert {"cpu", "cores", "memory_bytes", "gpu"} <= set(found["machine"])
    assert {"python", "jax", "jaxlib", "flax", "numpy", "jserve"} <= set(found["versions"])
    assert "a table" in shown.err


def test_without_json_the_tables_are_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    report.console(arguments()).print(table("a table", ["", "8 users"], [["tokens", 1.0]]))
    emit(RESULT, arguments())
    assert "a table" in capsys.readouterr().out


def test_saved_results_carry_their_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    emit(RESULT, arguments("--save", "laptop"))
    assert json.loads((tmp_path / "results" / "speed-laptop.json").read_text())["seed"] == 5
