"""The closed loop: C users, each of whom plays a dialogue turn by turn and says nothing before the reply has ended.

The user's words come from the dialogue, the assistant's from the server itself, so a conversation grows as it would in
use. When one has ended its user takes the next. One loop for every server; what differs is its transport.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.transports import ChatError, Message, Transport, Usage
from bench.workloads.dialogues import WorkloadError, spoken
from jserve.simulation.workload import Session

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """One call, timed. All times are seconds of the same clock."""

    dialogue: str
    index: int
    """0 is the dialogue's first turn, whose history is empty."""
    messages: tuple[Message, ...]
    """The prompt: the history and the user's new words."""
    text: str
    usage: Usage
    start_s: float
    text_times_s: tuple[float, ...]
    """When each piece of text came."""
    end_s: float

    @property
    def ttft_s(self) -> float:
        return (self.text_times_s[0] if self.text_times_s else self.end_s) - self.start_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first, in the mean of this turn."""
        return (self.end_s - self.start_s - self.ttft_s) / max(1, self.usage.output_tokens - 1)

    def tokens_by(self, time_s: float) -> float:
        """Output tokens that had arrived: the server's count, spread evenly over the pieces of text."""
        if time_s >= self.end_s:
            return self.usage.output_tokens
        arrived = sum(t <= time_s for t in self.text_times_s)
        return self.usage.output_tokens * arrived / max(1, len(self.text_times_s))


@dataclass(frozen=True)
class Run:
    """All turns of one closed loop. It counts from the start until a user finds no work: until then all C are busy."""

    turns: tuple[Turn, ...]
    start_s: float
    busy_until_s: float

    @property
    def output_tokens_per_s(self) -> float:
        return sum(t.tokens_by(self.busy_until_s) for t in self.turns) / (self.busy_until_s - self.start_s)

    def measured(self, *, later: bool | None = None) -> list[Turn]:
        """Turns that began and ended while all users were busy: first ones, later ones, or both."""
        done = [t for t in self.turns if t.end_s <= self.busy_until_s]
        return [t for t in done if later is None or (t.index > 0) == later]

    @property
    def cached_share(self) -> float | None:
        """Share of the prompt tokens that were found in the cache; None if the server does not tell."""
        if any(t.usage.cached_tokens is None for t in self.turns):
            return None
        return sum(t.usage.cached_tokens or 0 for t in self.turns) / sum(t.usage.prompt_tokens for t in self.turns)


async def play(
    transport: Transport,
    dialogues: Sequence[Session],
    users: int | None,
    max_tokens: int | None,
    progress: Callable[[], None] = lambda: None,
) -> Run:
    """Play all dialogues with this many users, or, with None, each from its own start on. Users think as long as the
    dialogue says; replies have `max_tokens`, or, with None, as many as the dialogue says. `progress` is told of each
    turn's end.
    """
    turns: list[Turn] = []
    begun_s = time.perf_counter() - min((dialogue.start_s for dialogue in dialogues), default=0.0)

    async def whole(dialogue: Session) -> None:
        if users is None:
            await asyncio.sleep(max(0.0, begun_s + dialogue.start_s - time.perf_counter()))
        histories: dict[int, tuple[Message, ...]] = {-1: ()}  # by turn, its reply included
        for index, said in enumerate(dialogue.turns):
            await asyncio.sleep(said.think_s)
            parent = index - 1 if said.parent is None else said.parent
            messages = (*histories[parent], {"role": "user", "content": said.text})
            turn = await _say(transport, dialogue.id, index, messages, max_tokens or said.output_tokens, salt="")
            turns.append(turn)
            histories[index] = (*messages, {"role": "assistant", "content": turn.text})
            progress()

    start_s, busy_until_s = await _crowd(users or len(dialogues), dialogues, whole)
    return Run(tuple(turns), start_s, busy_until_s if users else time.perf_counter())


async def replay(
    transport: Transport,
    turns: Sequence[Turn],
    users: int,
    max_tokens: int | None,
    salt: str,
    progress: Callable[[], None] = lambda: None,
) -> Run:
    """Send the prompts of turns that were played before, each under a salt of its own, so that nothing is cached."""
    replayed: list[Turn] = []

    async def once(job: tuple[int, Turn]) -> None:
        n, turn = job
        tokens = max_tokens or turn.usage.output_tokens
        replayed.append(await _say(transport, turn.dialogue, turn.index, turn.messages, tokens, f"{salt}-{n}"))
        progress()

    start_s, busy_until_s = await _crowd(users, list(enumerate(turns)), once)
    return Run(tuple(replayed), start_s, busy_until_s)


async def _crowd(users: int, jobs: Sequence[T], work: Callable[[T], Awaitable[None]]) -> tuple[float, float]:
    """Have the users do all jobs. Returns when they began, and when the first of them found none left.

    The first failure ends them all.
    """
    waiting = deque(jobs)
    out_of_work_s: list[float] = []

    async def user() -> None:
        while waiting:
            await work(waiting.popleft())
        out_of_work_s.append(time.perf_counter())

    start_s = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(users, len(jobs))):
                group.create_task(user())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return start_s, min(out_of_work_s, default=start_s)


async def _say(
    transport: Transport, dialogue: str, index: int, messages: tuple[Message, ...], max_tokens: int, salt: str
) -> Turn:
    start_s = time.perf_counter()
    pieces: list[str] = []
    times_s: list[float] = []
    usage: Usage | None = None
    async for event in transport.chat(messages, max_tokens, salt):
        if isinstance(event, Usage):
            usage = event
        elif event:
            pieces.append(event)
            times_s.append(time.perf_counter())
    end_s = time.perf_counter()
    if usage is None:
        raise ChatError("the server did not tell its usage, so its tokens cannot be counted")
    return Turn(dialogue, index, messages, "".join(pieces), usage, start_s, tuple(times_s), end_s)


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    if not values:
        raise WorkloadError(
            "no turn ended while all users were busy: give each user more dialogues (--dialogues-per-user)"
        )
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


async def warm_up(transport: Transport, users: int, max_tokens: int = 16) -> None:
    """Two turns for each user that are not measured: first calls, first batches and connections cost extra."""
    await play(
        transport, [spoken(f"warm-up {n}", (f"Count to {n + 2}.", "Again.")) for n in range(users)], users, max_tokens
    )
