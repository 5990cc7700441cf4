"""The comparison's numbers are ours over theirs on the same work, and whoever is not there is named."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from rich.console import Console

from bench.closed_loop import Run, Turn
from bench.contest import Contest
from bench.transports import Usage


@dataclass
class Named:
    name: str
    note: str = ""


def run(speed: float, ttft_s: float, text: str = "same") -> Run:
    """One user: a first turn of no time to speak of, then a later one; `speed` output tokens a second in all."""
    end_s = 100 / speed
    first = Turn("d", 0, ({"content": "a"},), text, Usage(5, 50), 0.0, (0.001,), 0.002)
    later = Turn("d", 1, ({"content": "b"},), text, Usage(5, 50), end_s / 2, (end_s / 2 + ttft_s,), end_s)
    return Run((first, later), 0.0, end_s)


def contest(*names: str) -> Contest:
    return Contest([Named(name) for name in names], others_cores=[0.0])  # type: ignore[misc]


def test_ratios_are_ours_over_theirs() -> None:
    made = contest("jserve", "vllm")
    made.runs = {("jserve", 8, 0): run(30, 0.1), ("vllm", 8, 0): run(20, 0.4)}
    metrics = made.metrics([8], 1)
    assert metrics["vllm_ratio_c8"] == pytest.approx(1.5)
    assert metrics["ttft_later_vllm_ratio_c8"] == pytest.approx(0.25)
    assert metrics["jserve_output_tokens_per_s_c8"] == pytest.approx(30)
    assert metrics["vllm_output_tokens_per_s_c8"] == pytest.approx(20)


def test_the_median_of_the_rounds_counts_pair_by_pair() -> None:
    made = contest("jserve", "vllm")
    for round_, (ours, theirs) in enumerate([(10, 10), (40, 20), (90, 30)]):
        made.runs["jserve", 1, round_] = run(ours, 0.1)
        made.runs["vllm", 1, round_] = run(theirs, 0.1)
    assert made.metrics([1], 3)["vllm_ratio_c1"] == pytest.approx(2.0)


def test_replies_are_compared_where_the_prompts_are_equal() -> None:
    made = contest("jserve", "vllm", "llama_cpp_f32")
    made.runs = {
        ("jserve", 1, 0): run(10, 0.1),
        ("vllm", 1, 0): run(10, 0.1),
        ("llama_cpp_f32", 1, 0): run(10, 0.1, text="another"),
    }
    metrics = made.metrics([1], 1)
    assert metrics["same_text_vllm"] == 1.0
    assert metrics["same_text_llama_cpp_f32"] == 0.0


def test_a_peer_that_drops_out_is_named_with_its_reason_and_has_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    made = contest("jserve", "vllm")
    made.runs = {("jserve", 1, 0): run(10, 0.1), ("vllm", 1, 0): run(10, 0.1)}
    made.drop(made.systems[1], RuntimeError("ended with status 3"))
    made.show([1], 1, Console(width=200))
    assert "missing: vllm: ended with status 3" in capsys.readouterr().out
    assert not any("vllm" in name for name in made.metrics([1], 1))
