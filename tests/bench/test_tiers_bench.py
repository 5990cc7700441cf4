"""bench.tiers: all parts run end to end on a tiny shape, and every system of the conversations says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import tier_decision, tiers
from bench.tier_chat import Played, Talk
from bench.tier_links import Link
from bench.tier_write_through import Pair, compare

CLAIMED = {
    "h2d_share",
    "d2h_share",
    "disk_read_share",
    "disk_write_share",
    "write_through_overhead",
    "decision_us",
    "later_ttft_vs_infinite",
    "throughput_vs_recompute",
}


def test_every_part_is_measured_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["--shape", "tiny", "--chat-shape", "tiny", "--batch", "2", "--context", "24"]
    assert tiers.main(["--toy", "--json", "--directory", str(tmp_path), *shapes]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["metrics"].keys() >= CLAIMED
    assert found["metrics"]["same_tokens"] == 1
    assert found["metrics"]["compiles_after_warmup"] == 0
    assert found["missing"] == {}
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_named_and_the_rest_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    monkeypatch.setattr(tiers, "_measure_conversations", lambda *_: None)
    arguments = ["--toy", "--json", "--shape", "tiny", "--batch", "2", "--context", "24"]
    assert tiers.main([*arguments, "--directory", str(tmp_path)]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "has less than the" in found["missing"]["disk"]
    assert "decision_us" in found["metrics"]


def test_a_share_is_the_median_of_pairs_and_tells_how_far_they_differ() -> None:
    link = Link(1000, tier_s=[2.0, 9.0, 2.0], plain_s=[1.0, 1.0, 7.0])
    assert (link.bytes_per_s, link.plain_bytes_per_s, link.share) == (500, 1000, 0.5)
    slower_all_in_all = Link(1000, tier_s=[1.0, 10.0, 2.0, 20.0], plain_s=[0.8, 8.0, 1.6, 16.0])
    assert slower_all_in_all.share == pytest.approx(0.8)
    assert slower_all_in_all.share_spread == pytest.approx((0.8, 0.8))


def test_write_through_counts_in_the_steps_that_copy_and_outliers_do_not() -> None:
    plain = [1.0, 1.0] * 3
    copying = [1.0, 1.2] * 3  # every other step
    assert compare([Pair(plain, copying, 3)], period=2).overhead == pytest.approx(0.1)
    assert compare([Pair(plain, copying, 3), Pair([*plain[:5], 50.0], copying, 3)], 2).overhead == pytest.approx(0.1)


def test_a_third_of_every_prompt_is_on_each_tier_and_nothing_stays_staged() -> None:
    decided = tier_decision.measure(4, seed=1)
    assert len(decided.arrive_s) == len(decided.arrive_and_hash_s) == 2
    assert min(decided.blocks) >= tier_decision.SHORTEST // tier_decision.BLOCK
    drawn = [tier_decision._draw(tier_decision.random.Random("x"), b"root")]
    cache = tier_decision._populated(drawn, b"root")
    first, blocks = drawn[0], len(drawn[0].keys)
    tokens = blocks * tier_decision.BLOCK + 1
    assert cache._reaches(first.keys, tokens) == (first.device_blocks, first.host_blocks, blocks)


def test_the_work_knows_its_lengths() -> None:
    talk = Talk(conversations=4, users=2, turns=3, first_tokens=100, turn_tokens=10, output_tokens=5)
    assert talk.longest == 135
    assert talk.mean_history == (105 + 120) // 2
    assert talk.blocks(8) == 4 * 17
    played = Played(later_ttft_s=[0.1, 0.3, 0.2], told={0: [1, 2], 1: [3, 4]}, seconds=2.0)
    assert (played.later_ttft_p50_s, played.output_tokens_per_s) == (0.2, 2.0)
