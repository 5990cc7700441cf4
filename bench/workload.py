"""The work: real multi-turn dialogues, of which only the users' sides are used.

The same seed gives the same dialogues in the same order. A file is JSON lines, gzipped or not, in either of two
shapes: {"history": [{"user": ..., "bot": ...}]} or {"messages": [{"role": ..., "content": ...}]}.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FILE = ROOT.parent / "shared" / "data" / "mtbench101.jsonl.gz"
MIN_TURNS = 2
MAX_USER_CHARS = 2500
"""Of one dialogue: with the replies it stays below 2,048 tokens, the context that every compared system is given."""


class WorkloadError(Exception):
    """The dialogues cannot be read, or are too few."""


@dataclass(frozen=True)
class Dialogue:
    """What one user says, turn by turn. The model under test gives the replies."""

    id: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Workload:
    """Dialogues in the order drawn by the seed, and where they came from."""

    source: str
    dialogues: tuple[Dialogue, ...]

    def part(self, start: int, count: int) -> tuple[Dialogue, ...]:
        """`count` dialogues from position `start`. Parts that do not overlap share no history."""
        if start + count > len(self.dialogues):
            raise WorkloadError(
                f"{self.source} has {len(self.dialogues)} dialogues of at least {MIN_TURNS} turns, and this run needs "
                f"{start + count}: lower --dialogues-per-user or --repeats, or give a larger file"
            )
        return self.dialogues[start : start + count]


def load(path: Path | None, seed: int) -> Workload:
    """The file's dialogues, or the default file's if it is there, or the built-in ones."""
    if path is None and not DEFAULT_FILE.exists():
        return Workload("the built-in dialogues", _drawn(list(_built_in()), seed))
    path = path or DEFAULT_FILE
    try:
        lines = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).splitlines()
        dialogues = [Dialogue(str(n), _user_turns(json.loads(line))) for n, line in enumerate(lines) if line.strip()]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise WorkloadError(
            f"{path} is not JSON lines of dialogues ({error}): see bench/workload.py for the two shapes"
        ) from error
    return Workload(path.name, _drawn(dialogues, seed))


def _drawn(dialogues: list[Dialogue], seed: int) -> tuple[Dialogue, ...]:
    """The usable ones, each text once, shuffled."""
    usable = {d.turns: d for d in dialogues if len(d.turns) >= MIN_TURNS and sum(map(len, d.turns)) <= MAX_USER_CHARS}
    drawn = list(usable.values())
    random.Random(seed).shuffle(drawn)
    return tuple(drawn)


def _user_turns(record: dict[str, Any]) -> tuple[str, ...]:
    if "history" in record:
        return tuple(str(turn["user"]) for turn in record["history"])
    return tuple(str(message["content"]) for message in record["messages"] if message["role"] == "user")


def _built_in() -> Iterator[Dialogue]:
    """Small talk that needs no file: every topic through every line of questions."""
    topics = (
        "bread", "bicycles", "the Moon", "chess", "coffee", "volcanoes", "libraries", "whales", "bridges", "gardens",
        "trains", "glass", "honey", "clocks", "rivers", "kites", "maps", "winter", "violins", "lighthouses",
        "paper", "robots", "rice", "castles", "deserts", "soap", "stars", "sailing", "pottery", "owls",
        "ice", "lemons", "windmills", "caves", "letters", "drums", "salt", "tunnels", "wool", "mirrors",
    )  # fmt: skip
    lines = (
        ("Tell me something surprising about {}.", "Why is that so?", "Explain it again for a child of six."),
        (
            "I have to give a short talk about {}. Suggest three points.",
            "Expand the second point into a paragraph.",
            "Now write a closing sentence for the talk.",
            "Make that sentence shorter.",
        ),
        (
            "What should a beginner know about {}?",
            "Which mistake do beginners make most often, and how can it be avoided?",
        ),
        ("Write a two-line rhyme about {}.", "Give it a title.", "Write two more lines in the same style."),
        ("Compare {} today with a hundred years ago.", "What might it be like a hundred years from now?"),
    )
    for topic in topics:
        for n, line in enumerate(lines):
            yield Dialogue(f"{topic}-{n}", tuple(turn.format(topic) for turn in line))
