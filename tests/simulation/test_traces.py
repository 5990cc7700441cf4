"""Every trace that is known becomes the same kind of work; anything else is refused by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bench.workloads import lengths
from jserve.errors import ConfigError
from jserve.simulation.traces import read_trace

OASST = [
    {"user_message_id": "q", "parent_message_id": None, "role": "prompter", "text": "q" * 40},
    {"user_message_id": "a1", "parent_message_id": "q", "role": "assistant", "text": "a" * 80},
    {"user_message_id": "a2", "parent_message_id": "q", "role": "assistant", "text": "b" * 40},
    {"user_message_id": "q2", "parent_message_id": "a1", "role": "prompter", "text": "c" * 4},
    {"user_message_id": "a3", "parent_message_id": "q2", "role": "assistant", "text": "d" * 4},
]
TEXTS = {
    "lengths": "[[10, 20], [5, 6]]\n[[1, 1]]\n",
    "mooncake": '{"timestamp": 500, "input_length": 700, "output_length": 5, "hash_ids": [0, 9]}\n',
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5000000,30,4\n"
    "2023-11-16 18:15:48.0000000,31,5\n",
    "dialogues": json.dumps({"history": [{"user": "hello you", "bot": "hi"}, {"user": "why", "bot": "so"}]}),
    "oasst": json.dumps(OASST, indent=1),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "turns"), [("lengths", 3), ("mooncake", 1), ("azure", 2), ("dialogues", 2), ("oasst", 3)]
)
def test_a_trace_is_known_by_what_it_holds(tmp_path: Path, name: str, turns: int, packed: bool) -> None:
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(TEXTS[name].encode()) if packed else TEXTS[name].encode())
    assert read_trace(path, 4096).num_turns == turns


def test_mooncake_shares_what_its_hash_ids_share(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(TEXTS["mooncake"])
    (session,) = read_trace(path, 4096).sessions
    assert [(s.content, s.tokens) for s in session.turns[0].prompt] == [(1, 512), (10, 188)]
    assert session.start_s == 0.5


def test_azure_keeps_its_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(TEXTS["azure"])
    assert [session.start_s for session in read_trace(path, 4096).sessions] == [0.0, 1.5]


def test_trees_branch_where_a_question_has_two_answers(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(TEXTS["oasst"])
    (session,) = read_trace(path, 4096).sessions
    assert [(turn.parent, turn.prompt_tokens, turn.output_tokens) for turn in session.turns] == [
        (-1, 10, 20),
        (0, 1, 1),
        (-1, 10, 10),
    ]
    assert session.turns[0].prompt == session.turns[2].prompt


def test_what_is_too_long_is_cut_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("[[100, 100], [100, 100], [100, 100]]")
    assert [len(session.turns) for session in read_trace(path, 450).sessions] == [2, 1]
    with pytest.raises(ConfigError, match="no request of at most 50 tokens"):
        read_trace(path, 50)


@pytest.mark.parametrize("text", ["hello", "[1, 2]", "{}", '{"hash_ids": []}', ""])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd"
    path.write_text(text)
    with pytest.raises(ConfigError, match="odd"):
        read_trace(path, 4096)


@pytest.mark.skipif(not lengths.SHAREGPT.exists(), reason="the shared data are not there")
def test_the_projects_own_traces_are_read() -> None:
    assert lengths.sharegpt(16384, 0).num_turns > 30000
    assert read_trace(lengths.AZURE, 16384).num_turns > 19000
    assert read_trace(lengths.OASST, 16384).num_turns > 150
    assert read_trace(lengths.MTBENCH, 16384).num_turns > 4000


@pytest.mark.parametrize("shape", [lengths.ALPACA, lengths.HUMANEVAL])
def test_other_data_keep_sharegpts_turns_and_their_own_lengths(shape: lengths.Lengths, tmp_path: Path) -> None:
    work = lengths.like(shape, 16384, 1, tmp_path / "absent")
    turns = [turn for session in work.sessions for turn in session.turns]
    assert sum(t.prompt_tokens for t in turns) / len(turns) == pytest.approx(shape.prompt_tokens, rel=0.05)
    assert sum(t.output_tokens for t in turns) / len(turns) == pytest.approx(shape.output_tokens, rel=0.05)
    counts = sorted(len(session.turns) for session in work.sessions)
    assert counts[len(counts) // 2] in (3, 4)
