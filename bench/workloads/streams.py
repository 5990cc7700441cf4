"""Any work by name or file, with words, so that a server can be asked it: what has lengths alone gets plain words.

The same content is the same words wherever it stands, so that shared prefixes stay shared. Common short words are one
token each in most vocabularies; the server's own count is what is measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from bench.workloads import lengths
from bench.workloads.dialogues import WorkloadError
from jserve.errors import ConfigError
from jserve.simulation.traces import read_trace
from jserve.simulation.workload import Segment, Session, Workload

WORDS = (
    "the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "with", "as", "by", "at", "from", "his", "it",
    "an", "were", "are", "which", "this", "also", "be", "has", "or", "had", "first", "one", "their", "its", "new",
    "after", "but", "who", "not", "they", "have", "her", "she", "two", "been", "other", "when", "there", "all",
    "during", "into", "school", "time", "may", "years", "more", "most", "only", "over", "city", "some", "world",
    "would", "where", "later", "up", "such", "used", "many", "can", "state", "about", "national", "out", "known",
)  # fmt: skip

NAMED: Mapping[str, Callable[[int, int], Workload]] = {
    "sharegpt": lengths.sharegpt,
    "alpaca": lambda max_tokens, seed: lengths.like(lengths.ALPACA, max_tokens, seed),
    "humaneval": lambda max_tokens, seed: lengths.like(lengths.HUMANEVAL, max_tokens, seed),
    "long": lambda max_tokens, seed: lengths.long_context(max_tokens * 16 // 17, 1000, seed),
    "mooncake": lambda max_tokens, seed: read_trace(lengths.MOONCAKE, max_tokens),
    "azure": lambda max_tokens, seed: read_trace(lengths.AZURE, max_tokens),
    "oasst": lambda max_tokens, seed: read_trace(lengths.OASST, max_tokens),
}


def stream(name: str, max_tokens: int, seed: int) -> Workload:
    """The named work, or that of a trace file, within a context of so many tokens. Raises WorkloadError."""
    try:
        work = NAMED[name](max_tokens, seed) if name in NAMED else read_trace(Path(name), max_tokens)
    except ConfigError as error:
        raise WorkloadError(f"{error} (named work: {', '.join(NAMED)})") from error
    return work


def worded(session: Session) -> Session:
    """The session with words in every turn."""
    turns = (t if t.text else replace(t, text=" ".join(map(_words, t.prompt))) for t in session.turns)
    return replace(session, turns=tuple(turns))


def _words(segment: Segment) -> str:
    return " ".join(random.Random(segment.content).choices(WORDS, k=segment.tokens))
