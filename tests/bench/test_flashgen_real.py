"""The arms on a real engine: every one is served and simulated, and all give the same answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import flashgen_real
from bench.flashgen_real import Pair, entered_late, same_answers, same_order
from jserve.simulation.arms import ARMS
from jserve.simulation.workload import chat_session, contents


def test_every_arm_is_served_and_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--clients 3 --calls 16 --warm-up 1 --scale 0.02 --max-tokens 128 --device-tokens 160 --host-tokens 160"
    flags = f"--model-shape tiny --think-ms 0.1 --max-running 2 --token-budget 16 --directory {tmp_path} {sizes} --json"
    assert flashgen_real.main(flags.split()) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    metrics = found["metrics"]
    assert metrics["same_tokens"] == 1
    assert metrics["equal_prompts"] >= 8
    for name in ARMS:
        short = name.replace("-", "_")
        assert metrics[f"{short}_output_tokens_per_s"] > 0
        assert metrics[f"{short}_simulated_output_tokens_per_s"] > 0
    assert metrics["vllm_host_hit_share"] == metrics["cachedattention_device_hit_share"] == 0
    assert found["config"]["compiles_after_warmup"] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_chat_that_is_entered_late_has_its_past_in_its_first_prompt() -> None:
    chat = chat_session("a", [(10, 20), (30, 40), (50, 60), (70, 80)], contents())
    late = entered_late(chat)
    assert [turn.prompt_tokens for turn in late.turns] == [10 + 20 + 30 + 40 + 50, 70]
    assert late.longest_tokens == chat.longest_tokens
    assert entered_late(late).longest_tokens == chat.longest_tokens
    (single,) = entered_late(entered_late(late)).turns
    assert single.prompt_tokens == chat.longest_tokens - 80


def test_only_equal_prompts_are_compared() -> None:
    one = {("a", 0): ([1], [5, 6]), ("a", 1): ([1, 5, 6, 2], [7])}
    other = {("a", 0): ([1], [5, 9]), ("a", 1): ([1, 5, 9, 2], [8])}
    assert same_answers([one, dict(one)]) == (2, 2)
    assert same_answers([one, other]) == (0, 1)


def test_arms_that_are_close_have_no_order() -> None:
    def arm(real: float, simulated: float) -> Pair:
        return Pair("", {"rate": real}, {"rate": simulated}, {}, {}, 0.0)

    assert same_order([arm(100, 50), arm(105, 40), arm(200, 90)], "rate") == (2, 2)
    assert same_order([arm(100, 50), arm(200, 40)], "rate") == (0, 1)
