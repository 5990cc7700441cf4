"""Traces from files: lengths of chats, production traces, dialogues with text. All become a `Workload`.

| what a line, or the file, looks like | what it is |
|---|---|
| `[[user_tokens, answer_tokens], ...]` | the turn lengths of one chat (ShareGPT) |
| `{"timestamp": ms, "input_length", "output_length", "hash_ids": [...]}` | Mooncake: 512-token blocks by content |
| CSV with TIMESTAMP, ContextTokens, GeneratedTokens | Azure's LLM inference traces (Splitwise) |
| `{"history": [{"user", "bot"}]}` or `{"messages": [{"role", "content"}]}` | dialogues with text |
| one JSON list of messages with `parent_message_id` | trees of messages (OASST): branching conversations |

Files may be gzipped. Texts count four characters a token.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jserve.errors import ConfigError
from jserve.simulation.workload import (
    THINK_S_PER_TOKEN,
    Segment,
    Session,
    Turn,
    Workload,
    chat_session,
    contents,
    split_to,
)

MOONCAKE_BLOCK_TOKENS = 512
CHARS_PER_TOKEN = 4


def read_trace(path: Path, max_tokens: int) -> Workload:
    """The trace in this file, whatever its format is; ConfigError if it is none of those above.

    `max_tokens`: chats are cut to so many; calls of other traces that are longer are left out.
    """
    text = read_text(path)
    reader = _reader(path, text)
    try:
        sessions = tuple(reader(text, max_tokens))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path} begins like {reader.__name__} but does not go on so ({error!r})") from None
    if not sessions:
        raise ConfigError(f"{path} holds no request of at most {max_tokens} tokens: give a larger --max-model-len")
    return Workload(path.name, sessions)


def read_text(path: Path) -> str:
    """The file's text, unpacked if it is gzipped. Raises ConfigError."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give a trace, such as a file of turn lengths") from None


Reader = Callable[[str, int], Iterator[Session]]


def _reader(path: Path, text: str) -> Reader:
    first = text.lstrip()[:1]
    if text.startswith("TIMESTAMP,"):
        return azure
    line = next((line for line in text.splitlines() if line.strip()), "")
    try:
        record = json.loads(line)
    except ValueError:
        record = json.loads(text) if first == "[" and _is_json(text) else None
    match record:
        case [[int(), int()], *_]:
            return turn_lengths
        case {"hash_ids": _}:
            return mooncake
        case {"history": _} | {"messages": _}:
            return dialogues
        case [{"parent_message_id": _}, *_]:
            return message_trees
    raise ConfigError(
        f"{path} is no trace that is known: give turn lengths ([[user, answer], ...] a line), a Mooncake or Azure "
        "trace, dialogues, or trees of messages"
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def turn_lengths(
    text: str, max_tokens: int, *, think_s_per_token: float = THINK_S_PER_TOKEN, start_s: float = 0.0
) -> Iterator[Session]:
    """Chats by the lengths of their turns, cut to the context."""
    fresh = contents()
    for n, line in enumerate(_lines(text)):
        lengths = [(user, answer) for user, answer in json.loads(line)]
        for part, cut in enumerate(split_to(lengths, max_tokens)):
            yield chat_session(f"{n}.{part}", cut, fresh, think_s_per_token=think_s_per_token)


def mooncake(text: str, max_tokens: int) -> Iterator[Session]:
    """A request each; what two have in common, their hash ids tell, in blocks of 512 tokens."""
    for n, line in enumerate(_lines(text)):
        record = json.loads(line)
        left = record["input_length"]
        if left + record["output_length"] > max_tokens:
            continue
        segments = []
        for content in record["hash_ids"]:
            segments.append(Segment(content + 1, min(left, MOONCAKE_BLOCK_TOKENS)))
            left -= segments[-1].tokens
        turn = Turn(tuple(segments), max(1, record["output_length"]))
        yield Session(str(n), (turn,), record["timestamp"] / 1e3)


def azure(text: str, max_tokens: int) -> Iterator[Session]:
    """A request each, all different: the trace tells no contents."""
    fresh = contents()
    start: datetime | None = None
    for n, row in enumerate(csv.DictReader(text.splitlines())):
        time = datetime.fromisoformat(row["TIMESTAMP"][:26])
        start = start or time
        prompt, output = max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))
        if prompt + output <= max_tokens:
            turn = Turn((Segment(next(fresh), prompt),), output)
            yield Session(str(n), (turn,), (time - start).total_seconds())


def dialogues(text: str, max_tokens: int) -> Iterator[Session]:
    """Chats with text; the answers' lengths are those of the recorded ones."""
    fresh = contents()
    for n, line in enumerate(_lines(text)):
        said = list(exchanges(json.loads(line)))
        turns: list[Turn] = []
        used = answered = 0
        for user, bot in said:
            prompt, output = tokens_of(user), tokens_of(bot)
            if used + prompt + output > max_tokens:
                break
            think_s = (prompt + answered) * THINK_S_PER_TOKEN
            turns.append(Turn((Segment(next(fresh), prompt),), output, think_s, text=user))
            used, answered = used + prompt + output, output
        if turns:
            yield Session(str(n), tuple(turns))


def exchanges(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the user said and what was answered, turn by turn."""
    if "history" in record:
        for turn in record["history"]:
            yield str(turn["user"]), str(turn.get("bot", ""))
        return
    messages = record["messages"]
    for i, message in enumerate(messages):
        if message["role"] == "user":
            answer = messages[i + 1] if i + 1 < len(messages) else {"role": "assistant", "content": ""}
            yield str(message["content"]), str(answer["content"]) if answer["role"] == "assistant" else ""


def message_trees(text: str, max_tokens: int) -> Iterator[Session]:
    """Trees of messages: a session plays every question of a tree that has an answer, the first child first.

    Another answer to the same question, or another question after the same answer, is a branch of the session: it
    shares the history up to there.
    """
    messages: list[dict[str, Any]] = json.loads(text)
    children: dict[str | None, list[dict[str, Any]]] = {}
    for message in messages:
        children.setdefault(message["parent_message_id"], []).append(message)
    fresh = contents()
    for n, root in enumerate(children.get(None, [])):
        turns: list[Turn] = []
        totals: list[int] = []
        _play_tree(root, -1, 0, children, turns, totals, fresh, max_tokens)
        if turns:
            yield Session(f"tree {n}", tuple(turns))


def _play_tree(
    question: dict[str, Any],
    parent: int,
    history: int,
    children: Mapping[str | None, Sequence[dict[str, Any]]],
    turns: list[Turn],
    totals: list[int],
    fresh: Iterator[int],
    max_tokens: int,
) -> None:
    """Append the turns of this question's subtree; `parent` is the turn before it, `history` its tokens."""
    prompt = tokens_of(question["text"])
    segment = Segment(next(fresh), prompt)
    for answer in children.get(question["user_message_id"], []):
        output = tokens_of(answer["text"])
        total = history + prompt + output
        if total > max_tokens:
            continue
        think_s = (prompt + (turns[-1].output_tokens if turns else 0)) * THINK_S_PER_TOKEN
        turns.append(Turn((segment,), output, think_s, parent, question["text"]))
        this = len(turns) - 1
        for following in children.get(answer["user_message_id"], []):
            _play_tree(following, this, total, children, turns, totals, fresh, max_tokens)


def tokens_of(text: str) -> int:
    """About as many as a tokenizer would find."""
    return max(1, round(len(text) / CHARS_PER_TOKEN))


def _lines(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if line.strip())
