"""The work: real multi-turn dialogues, of which only the users' sides are used.

The same seed gives the same dialogues in the same order. A file is JSON lines, gzipped or not, in either of two
shapes: {"history": [{"user": ..., "bot": ...}]} or {"messages": [{"role": ..., "content": ...}]}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from jserve.errors import ConfigError
from jserve.simulation.traces import exchanges, read_text, tokens_of
from jserve.simulation.workload import Segment, Session, Turn, Workload, contents

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_FILE = ROOT.parent / "shared" / "data" / "mtbench101.jsonl.gz"
MIN_TURNS = 2
MAX_USER_CHARS = 2500
"""Of one dialogue: with the replies it stays below 2,048 tokens, the context that every compared system is given."""


class WorkloadError(Exception):
    """The dialogues cannot be read, or are too few."""


def part(work: Workload, start: int, count: int) -> tuple[Session, ...]:
    """`count` dialogues from position `start`. Parts that do not overlap share no history."""
    if start + count > len(work.sessions):
        raise WorkloadError(
            f"{work.name} has {len(work.sessions)} dialogues of at least {MIN_TURNS} turns, and this run needs "
            f"{start + count}: lower --dialogues-per-user or --repeats, or give a larger file"
        )
    return work.sessions[start : start + count]


def spoken(name: str, words: tuple[str, ...], answer_tokens: int = 1) -> Session:
    """A dialogue of these words of a user's, who needs no time to think."""
    fresh = contents()
    turns = (Turn((Segment(next(fresh), tokens_of(text)),), answer_tokens, text=text) for text in words)
    return Session(name, tuple(turns))


def load(path: Path | None, seed: int) -> Workload:
    """The file's dialogues, or the default file's if it is there, or the built-in ones."""
    if path is None and not DEFAULT_FILE.exists():
        return Workload("the built-in dialogues", _drawn(list(_built_in()), seed))
    path = path or DEFAULT_FILE
    try:
        lines = read_text(path).splitlines()
        dialogues = [spoken(str(n), _user_turns(line)) for n, line in enumerate(lines) if line.strip()]
    except ConfigError as error:
        raise WorkloadError(str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise WorkloadError(
            f"{path} is not JSON lines of dialogues ({error}): see bench/workloads/dialogues.py for the two shapes"
        ) from error
    return Workload(path.name, _drawn(dialogues, seed))


def words(session: Session) -> tuple[str, ...]:
    """What the user says, turn by turn."""
    return tuple(turn.text for turn in session.turns)


def _drawn(dialogues: list[Session], seed: int) -> tuple[Session, ...]:
    """The usable ones, each text once, shuffled."""
    usable = {words(d): d for d in dialogues if len(d.turns) >= MIN_TURNS and sum(map(len, words(d))) <= MAX_USER_CHARS}
    drawn = list(usable.values())
    random.Random(seed).shuffle(drawn)
    return tuple(drawn)


def _user_turns(line: str) -> tuple[str, ...]:
    return tuple(user for user, _ in exchanges(json.loads(line)))


def _built_in() -> Iterator[Session]:
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
            yield spoken(f"{topic}-{n}", tuple(turn.format(topic) for turn in line))
