"""The same seed gives the same dialogues; a file that cannot be read is told as such."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bench.workloads import dialogues
from bench.workloads.dialogues import MIN_TURNS, WorkloadError, load, part

RECORDS = [{"history": [{"user": f"{n} hello", "bot": "hi"}, {"user": f"{n} why", "bot": "so"}]} for n in range(20)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "dialogues.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    return path


def test_the_seed_chooses(path: Path) -> None:
    assert load(path, 3) == load(path, 3)
    assert load(path, 3).sessions != load(path, 4).sessions
    assert set(load(path, 3).sessions) == set(load(path, 4).sessions)


def test_parts_do_not_overlap(path: Path) -> None:
    work = load(path, 0)
    assert not set(part(work, 0, 8)) & set(part(work, 8, 8))


def test_both_shapes_and_gzip_give_the_same_dialogues(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "messages.jsonl.gz"
    roles = {"user": "user", "bot": "assistant"}
    shaped = [
        {"messages": [{"role": roles[who], "content": text} for turn in r["history"] for who, text in turn.items()]}
        for r in RECORDS
    ]
    other.write_bytes(gzip.compress("\n".join(map(json.dumps, shaped)).encode()))
    assert load(other, 1).sessions == load(path, 1).sessions


def test_dialogues_of_one_turn_and_repeated_ones_are_left_out(path: Path) -> None:
    with path.open("a") as file:
        file.write("\n" + json.dumps({"history": [{"user": "alone", "bot": "yes"}]}))
        file.write("\n" + json.dumps(RECORDS[0]))
    assert len(load(path, 0).sessions) == len(RECORDS)


def test_without_a_file_the_built_in_dialogues_are_enough_for_a_whole_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialogues, "DEFAULT_FILE", tmp_path / "absent")
    work = load(None, 0)
    assert work.name == "the built-in dialogues"
    assert len(work.sessions) >= 3 * (4 + 16 + 32)
    assert all(len(d.turns) >= MIN_TURNS for d in work.sessions)


def test_too_few_dialogues_name_the_way_out(path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"has 20 dialogues .* needs 21: lower --dialogues-per-user"):
        part(load(path, 0), 13, 8)


@pytest.mark.parametrize("text", ["not json", '{"words": []}', '{"history": [{"bot": "hi"}]}', "[]"])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=r"odd\.jsonl is not JSON lines of dialogues"):
        load(path, 0)


def test_an_absent_file_is_told() -> None:
    with pytest.raises(WorkloadError, match=r"nowhere\.jsonl"):
        load(Path("nowhere.jsonl"), 0)
