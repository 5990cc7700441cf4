"""Work that is lengths alone, for simulations: ShareGPT's chats, chats with the lengths of other data, long contexts.

Real traces are read by `jserve.simulation.traces`; `DATA` is where the ones of this project lie.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from jserve.simulation.traces import read_text, read_trace
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

DATA = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "data"
SHAREGPT = DATA / "sharegpt_turn_lengths.jsonl.gz"
MOONCAKE = DATA / "mooncake_conversation_trace.jsonl.gz"
AZURE = DATA / "azure2023_conv.csv.gz"
OASST = DATA / "oasst_realistic_seed_data.json"
MTBENCH = DATA / "mtbench101.jsonl.gz"


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a question and of its answer. Only the means are published: both are drawn as exponential."""

    name: str
    prompt_tokens: float
    output_tokens: float
    source: str


ALPACA = Lengths("alpaca-like", 19.31, 58.45, "vLLM, SOSP'23, figure 11")
HUMANEVAL = Lengths("humaneval-like", 171.3, 98.2, "DistServe, OSDI'24, table of data sets")


def sharegpt(max_tokens: int, seed: int, path: Path = SHAREGPT) -> Workload:
    """Real ShareGPT chats in an order drawn by the seed, cut to the context; without the file, chats much like them."""
    if not path.exists():
        return _like_sharegpt(max_tokens, seed)
    return shuffled(read_trace(path, max_tokens), seed)


def like(lengths: Lengths, max_tokens: int, seed: int, path: Path = SHAREGPT) -> Workload:
    """Chats with ShareGPT's numbers of turns and these lengths, as FlashGen made its Alpaca and HumanEval work."""
    rng = random.Random(seed)
    turns = _turn_counts(seed, path)
    return Workload(lengths.name, _drawn(turns, lengths, max_tokens, rng))


def long_context(longest: int, sessions: int, seed: int) -> Workload:
    """Single requests, prompts uniform in [4, longest] and answers in [32, longest/16] (FlashGen §5.6, figure 19)."""
    rng, fresh = random.Random(seed), contents()
    made = []
    for n in range(sessions):
        prompt, output = rng.randint(4, longest), rng.randint(32, longest // 16)
        turn = Turn((Segment(next(fresh), prompt),), output, (prompt + output) * THINK_S_PER_TOKEN / 10)
        made.append(Session(str(n), (turn,)))
    return Workload(f"long context, prompts up to {longest // 1024}k", tuple(made))


def smaller(work: Workload, scale: float, max_tokens: int, think_s_per_token: float) -> Workload:
    """The same chats, their turns `scale` times as long, cut to a context of `max_tokens`: for small machines."""
    fresh = contents()
    sessions = []
    for session in work.sessions:
        turns = [(round(turn.prompt_tokens * scale), round(turn.output_tokens * scale)) for turn in session.turns]
        for part, cut in enumerate(split_to(turns, max_tokens)):
            sessions.append(chat_session(f"{session.id}.{part}", cut, fresh, think_s_per_token=think_s_per_token))
    return replace(work, name=f"{work.name}, {scale:g} times as long", sessions=tuple(sessions))


def restless(work: Workload, seed: int) -> Workload:
    """The same chats by people who need, for equal words, now half and now three times as long: think times are drawn
    as exponential, of the same mean."""
    rng = random.Random(seed)
    sessions = tuple(
        replace(
            session,
            turns=tuple(replace(turn, think_s=rng.expovariate(1 / max(turn.think_s, 1e-9))) for turn in session.turns),
        )
        for session in work.sessions
    )
    return replace(work, name=f"{work.name}, random think times", sessions=sessions)


def shuffled(work: Workload, seed: int) -> Workload:
    """The sessions in an order drawn by the seed."""
    sessions = list(work.sessions)
    random.Random(seed).shuffle(sessions)
    return replace(work, sessions=tuple(sessions))


def _turn_counts(seed: int, path: Path) -> list[int]:
    if not path.exists():
        return _published_turn_counts(random.Random(seed), 4000)
    counts = [len(json.loads(line)) for line in read_text(path).splitlines() if line.strip()]
    random.Random(seed).shuffle(counts)
    return counts


def _published_turn_counts(rng: random.Random, sessions: int) -> list[int]:
    """28 % have one turn, the median is 3, 48 % have more than 3, the mean is 7 (FlashGen §2.3.1)."""
    drawn = []
    for _ in range(sessions):
        u = rng.random()
        drawn.append(1 if u < 0.28 else rng.choice((2, 3)) if u < 0.52 else 4 + int(rng.expovariate(1 / 7.5)))
    return drawn


def _like_sharegpt(max_tokens: int, seed: int) -> Workload:
    """Without the data: chats of its published turn counts and mean lengths."""
    rng = random.Random(seed)
    lengths = Lengths("sharegpt-like (the data are not there)", 103.0, 335.0, "means of the ShareGPT data set")
    return Workload(lengths.name, _drawn(_published_turn_counts(rng, 4000), lengths, max_tokens, rng))


def _drawn(turns: list[int], lengths: Lengths, max_tokens: int, rng: random.Random) -> tuple[Session, ...]:
    fresh = contents()
    sessions = []
    for n, count in enumerate(turns):
        drawn = [
            (1 + int(rng.expovariate(1 / lengths.prompt_tokens)), 1 + int(rng.expovariate(1 / lengths.output_tokens)))
            for _ in range(count)
        ]
        for part, cut in enumerate(split_to(drawn, max_tokens)):
            sessions.append(chat_session(f"{n}.{part}", cut, fresh))
    return tuple(sessions)
