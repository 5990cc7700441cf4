"""`jserve simulate` and `jserve plan` tell a user what to expect, or in one line why they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jserve.cli import main


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps([[40 + n, 100], [20, 80], [10, 60]]) for n in range(40)))
    return path


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_policies_are_compared_under_each_load(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--gpu", "a100-80gb", "--tp", 2, "--model", "llama-2-70b", "--policy", "vllm", "--policy", "jserve")
    status, out, _ = said(capsys, "simulate", trace, *flags, "--clients", "2,4", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["simulated"] is True
    assert [(row["policy"], row["load"]) for row in told["rows"]] == [
        (policy, load) for load in ("2 clients", "4 clients") for policy in ("vllm", "jserve")
    ]
    assert all(row["calls"] == 120 and row["refused"] == 0 for row in told["rows"])


def test_the_table_says_that_it_is_simulated(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "simulate", trace, "--rate", "0.5,2", "--no-disk")
    assert status == 0
    assert out.startswith("simulated: Llama-3-8B on 1 x NVIDIA A100 80GB SXM, chats.jsonl (120 requests)")
    assert "0.5/s" in out
    assert "2/s" in out


def test_requests_that_no_context_holds_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = [
        {"timestamp": 1000 * n, "input_length": length, "output_length": 8, "hash_ids": list(range(-(-length // 512)))}
        for n, length in enumerate((100, 9000, 200))
    ]
    path = tmp_path / "calls.jsonl"
    path.write_text("\n".join(map(json.dumps, calls)))
    status, out, err = said(capsys, "simulate", path, "--model", "llama-3-8b", "--max-model-len", 4096)
    assert status == 0
    assert "calls.jsonl (2 requests)" in out
    shown = " ".join(err.split())
    assert "1 of the 3 requests in calls.jsonl are left out" in shown
    assert "--max-model-len raises" in shown


def test_a_picture_is_drawn(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = said(capsys, "simulate", trace, "--clients", "3", "--plot", tmp_path / "p.svg")
    assert status == 0
    assert "<svg" in (tmp_path / "p.svg").read_text()
    assert "drawn" in err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ((), "tells no times of arrival: give --clients"),
        (("--clients", "2", "--rate", "1"), "exclude each other"),
        (("--clients", "2", "--policy", "vlm"), "there is no policy 'vlm': use one of vllm"),
        (("--clients", "2", "--gpu", "a1000"), "there is no hardware 'a1000'"),
        (("--clients", "2", "--model", "llama-2-70b"), "does not fit on 1 x NVIDIA A100 80GB SXM: 138.0 GB"),
        (("--clients", "0"), "clients is 0"),
        (("--clients", "2", "--calibration", "nowhere.json"), "nowhere.json is no calibration"),
        (("--clients", "2", "--max-model-len", "20"), "no request of at most 20 tokens"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    trace: Path, flags: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = said(capsys, "simulate", trace, *flags)
    assert status == 2
    assert out == ""
    assert complaint in err
    assert "Traceback" not in err


def test_a_file_that_is_no_trace_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = said(capsys, "simulate", tmp_path / "absent", "--clients", "1")
    assert status == 2
    assert "absent cannot be read" in err


def test_a_plan_tells_fit_capacity_latency_and_break_even(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(
        capsys, "plan", "--gpu", "h200", "--model", "llama-3-8b", "--turns", 2, "--output", 40, "--json"
    )
    told = json.loads(out)
    assert status == 0
    assert told["weight_bytes"] == pytest.approx(16.06e9)
    assert 0.8e6 < told["device_tokens"] < 1.0e6
    assert told["ttft_device_s"] < told["ttft_host_s"] < told["ttft_disk_s"]
    # kv·η·F/(2P): 131 kB, 0.55 of 989 TFLOP/s, 8 G parameters; attention and fixed parts lower it
    assert told["break_even_bytes_per_s"] < 4.45e9
    rates = [load["requests_per_s"] for load in told["loads"]]
    assert rates == sorted(rates)
    assert told["goodput_requests_per_s"] > 0


def test_a_plan_for_what_does_not_fit_names_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said(capsys, "plan", "--gpu", "a100-80gb", "--model", "llama-2-70b")
    assert (status, out) == (2, "")
    assert "use --tp 2" in err
