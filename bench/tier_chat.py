"""A closed loop of multi-turn conversations on an engine in this process, for caches of different sizes.

Each user holds several conversations and goes round them, a turn of each, so that a history is as old as it can be when
it is needed again: with less device memory than all histories take, LRU has evicted every one of them. Words are random
tokens; lengths are fixed, so that every engine does the same work.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from jserve.engine import Engine
from jserve.request import EngineRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Talk:
    """The work."""

    conversations: int
    users: int
    turns: int
    first_tokens: int
    """Prompt of a conversation's first turn."""
    turn_tokens: int
    """What the user adds in each later turn."""
    output_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of a conversation at its end."""
        return self.first_tokens + (self.turns - 1) * self.turn_tokens + self.turns * self.output_tokens

    @property
    def mean_history(self) -> int:
        """Tokens that precede a later turn, in the mean."""
        return self.first_tokens + self.output_tokens + (self.turns - 2) * (self.turn_tokens + self.output_tokens) // 2

    def blocks(self, block_size: int) -> int:
        """The working set: all conversations at their end."""
        return self.conversations * -(-self.longest // block_size)


@dataclass(slots=True)
class Played:
    """How it went."""

    later_ttft_s: list[float] = field(default_factory=list)
    told: dict[int, list[int]] = field(default_factory=dict)
    """By conversation: all tokens that the engine has said."""
    seconds: float = 0.0
    cached_share: float = 0.0
    """Of the prompt tokens."""

    @property
    def later_ttft_p50_s(self) -> float:
        return median(self.later_ttft_s)

    @property
    def output_tokens_per_s(self) -> float:
        return sum(map(len, self.told.values())) / self.seconds


def play(engine: Engine, talk: Talk, seed: int) -> Played:
    """All turns of all conversations."""
    rngs = [random.Random(f"{seed} {i}") for i in range(talk.conversations)]
    histories: list[list[int]] = [[] for _ in range(talk.conversations)]
    played = Played(told={i: [] for i in range(talk.conversations)})
    sent: dict[str, tuple[int, int, float]] = {}  # by request: user, turn, when
    silent: set[str] = set()  # requests without a token
    agendas = [
        deque((i, turn) for turn in range(talk.turns) for i in range(user, talk.conversations, talk.users))
        for user in range(talk.users)
    ]

    def say(user: int) -> None:
        if not agendas[user]:
            return
        i, turn = agendas[user].popleft()
        words = talk.turn_tokens if turn else talk.first_tokens
        histories[i] += [rngs[i].randrange(engine.info.vocab_size) for _ in range(words)]
        sent[str(i)] = user, turn, time.perf_counter()
        silent.add(str(i))
        sampling = SamplingParams(max_tokens=talk.output_tokens)
        engine.add(EngineRequest(request_id=str(i), token_ids=list(histories[i]), sampling=sampling))

    before = engine.scheduler.stats
    prompt_tokens, cached_tokens = before.prompt_tokens, before.cached_tokens
    start_s = time.perf_counter()
    for user in range(talk.users):
        say(user)
    while sent:
        outputs = engine.step()
        now_s = time.perf_counter()
        for output in outputs:
            name, i = output.request_id, int(output.request_id)
            user, turn, sent_s = sent[name]
            if name in silent and turn:
                played.later_ttft_s.append(now_s - sent_s)
            silent.discard(name)
            histories[i] += output.token_ids
            played.told[i] += output.token_ids
            if output.finish_reason is not None:
                del sent[name]
                say(user)
    played.seconds = time.perf_counter() - start_s
    while engine.has_work:  # the last copies
        engine.step()
    after = engine.scheduler.stats
    played.cached_share = (after.cached_tokens - cached_tokens) / (after.prompt_tokens - prompt_tokens)
    return played
