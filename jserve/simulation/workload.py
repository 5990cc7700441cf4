"""Work for an engine, as a stream of conversations: what is said, how much is answered, and when.

One type for everything that plays work: the simulator, `jserve simulate` and the benchmarks. A `Session` is a
conversation of turns, each of which is sent a think time after the answer to the one before; a turn continues the
history of its parent, so that sessions may branch. Sessions arrive at times of their own (open loop) or are taken by a
number of clients, one after the other (closed loop). Lengths are in tokens; contents are numbers: the same number is
the same text, which is all that a prefix cache can see of it.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from jserve.errors import ConfigError

THINK_S_PER_TOKEN = 0.2
"""A user reads and writes 300 words a minute (FlashGen §5.1): closed-loop clients wait this for each token."""


@dataclass(frozen=True, slots=True)
class Segment:
    """So many tokens of one content, a number from 1 on. The same content is the same text wherever it stands."""

    content: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session: what it adds to the history, and the length of its answer."""

    prompt: tuple[Segment, ...]
    output_tokens: int
    think_s: float = 0.0
    """From the end of the turn that was played before it, or from the session's start, until it is sent."""
    parent: int | None = None
    """The turn whose history it continues; None: the one before it. -1: none, it starts anew."""
    text: str = ""
    """The user's words, where the work has any."""

    @property
    def prompt_tokens(self) -> int:
        """Without the history."""
        return sum(segment.tokens for segment in self.prompt)


@dataclass(frozen=True, slots=True)
class Session:
    """One conversation. Its turns are played in order, each after the answer to the one before."""

    id: str
    turns: tuple[Turn, ...]
    start_s: float = 0.0
    """When it arrives, in an open loop."""

    def history_of(self, turn: int) -> list[int]:
        """The turns, oldest first, that turn number `turn` continues."""
        path: list[int] = []
        at = _parent(self, turn)
        while at >= 0:
            path.append(at)
            at = _parent(self, at)
        return path[::-1]

    @property
    def longest_tokens(self) -> int:
        """Of its longest path."""
        totals: list[int] = []
        for i, turn in enumerate(self.turns):
            parent = _parent(self, i)
            totals.append(turn.prompt_tokens + turn.output_tokens + (totals[parent] if parent >= 0 else 0))
        return max(totals, default=0)


def _parent(session: Session, turn: int) -> int:
    parent = session.turns[turn].parent
    return turn - 1 if parent is None else parent


@dataclass(frozen=True)
class Workload:
    """Sessions in the order in which they arrive or are taken."""

    name: str
    sessions: tuple[Session, ...]
    clients: int | None = None
    """Closed loop: so many clients, each of which takes the next session when its own has ended. None: open loop."""

    @property
    def num_turns(self) -> int:
        return sum(len(session.turns) for session in self.sessions)

    @property
    def longest_tokens(self) -> int:
        return max((session.longest_tokens for session in self.sessions), default=0)


# --- how it arrives


def closed_loop(work: Workload, clients: int) -> Workload:
    """The same sessions for so many clients."""
    if clients < 1:
        raise ConfigError(f"clients is {clients}: use at least 1")
    return replace(work, clients=clients)


def poisson(work: Workload, sessions_per_s: float, seed: int) -> Workload:
    """The same sessions, arriving independently of each other."""
    _check_rate(sessions_per_s)
    rng = random.Random(seed)
    now_s, sessions = 0.0, []
    for session in work.sessions:
        now_s += rng.expovariate(sessions_per_s)
        sessions.append(replace(session, start_s=now_s))
    return replace(work, sessions=tuple(sessions), clients=None)


def bursts(work: Workload, sessions_per_s: float, size: int, seed: int) -> Workload:
    """The same mean rate, but `size` sessions at once: the bursts are Poisson."""
    _check_rate(sessions_per_s)
    if size < 1:
        raise ConfigError(f"the burst size is {size}: use at least 1")
    rng = random.Random(seed)
    now_s, sessions = 0.0, []
    for i, session in enumerate(work.sessions):
        if i % size == 0:
            now_s += rng.expovariate(sessions_per_s / size)
        sessions.append(replace(session, start_s=now_s))
    return replace(work, sessions=tuple(sessions), clients=None)


def compressed(work: Workload, factor: float) -> Workload:
    """The same work `factor` times as fast: all arrivals and think times are divided by it."""
    if not 0 < factor < math.inf:
        raise ConfigError(f"the time compression is {factor}: use a number above 0, such as 2 for twice the rate")
    return replace(
        work,
        sessions=tuple(
            replace(
                session,
                start_s=session.start_s / factor,
                turns=tuple(replace(turn, think_s=turn.think_s / factor) for turn in session.turns),
            )
            for session in work.sessions
        ),
    )


def _check_rate(sessions_per_s: float) -> None:
    if not 0 < sessions_per_s < math.inf:
        raise ConfigError(f"the rate is {sessions_per_s} sessions/s: use a number above 0")


# --- how sessions are made of lengths


def contents() -> Iterator[int]:
    """Numbers of contents that nobody else has used."""
    return count(1)


def chat_session(
    name: str,
    lengths: Iterable[tuple[int, int]],
    fresh: Iterator[int],
    *,
    think_s_per_token: float = THINK_S_PER_TOKEN,
) -> Session:
    """A chat of (user tokens, answer tokens) turns. The user needs time for the last answer and the new question."""
    turns: list[Turn] = []
    answered = 0
    for user, answer in lengths:
        think_s = (user + answered) * think_s_per_token
        turns.append(Turn((Segment(next(fresh), max(1, user)),), max(1, answer), think_s))
        answered = max(1, answer)
    return Session(name, tuple(turns))


def split_to(lengths: Sequence[tuple[int, int]], max_tokens: int) -> Iterator[list[tuple[int, int]]]:
    """Cut a chat that is too long for the context into several, as the seeds' data were cut (FastChat's splitter).

    A turn that is too long alone is left out.
    """
    part: list[tuple[int, int]] = []
    used = 0
    for user, answer in lengths:
        turn = max(1, user) + max(1, answer)
        if turn > max_tokens:
            continue
        if used + turn > max_tokens:
            yield part
            part, used = [], 0
        part.append((user, answer))
        used += turn
    if part:
        yield part


# --- who plays it


@dataclass(slots=True)
class Call:
    """One turn on its way: a request as the client sends it."""

    session: Session
    turn: int
    token_ids: list[int]
    due_s: float
    client: int
    """Who sends it: the client's number in a closed loop, the session's in an open one."""

    @property
    def output_tokens(self) -> int:
        return self.session.turns[self.turn].output_tokens


@dataclass(slots=True)
class _Player:
    client: int
    session: Session
    histories: dict[int, list[int]] = field(default_factory=dict)
    """Of each turn that a later one continues: all tokens, its answer included."""


class Users:
    """Plays a workload: tells which calls are due, and takes their answers."""

    def __init__(self, work: Workload, vocab_size: int) -> None:
        """`vocab_size`: contents become token ids below it."""
        self._vocab_size = vocab_size
        self._rest = iter(work.sessions)
        self._closed = work.clients is not None
        self._due: list[tuple[float, int, _Player, int]] = []
        self._order = count()
        self._clients = count()
        self.open_calls = 0
        self.wants_next = True
        """Whether a client whose session has ended takes another."""
        if work.clients is not None:
            for _ in range(work.clients):
                self._start_next(0.0)
        else:
            ordered = sorted(work.sessions, key=lambda session: session.start_s)
            for session in ordered:
                self._start(_Player(next(self._clients), session), session.start_s)

    @property
    def next_s(self) -> float:
        """When the next call is due; infinite if that depends on answers, or if all is played."""
        return self._due[0][0] if self._due else math.inf

    @property
    def has_work(self) -> bool:
        return bool(self._due) or self.open_calls > 0

    def due(self, now_s: float) -> Iterator[tuple[Call, object]]:
        """The calls that are due by now, each with what `answered` wants to know it by."""
        while self._due and self._due[0][0] <= now_s:
            due_s, _, player, turn = heapq.heappop(self._due)
            self.open_calls += 1
            call = Call(player.session, turn, self._tokens(player, turn), due_s, player.client)
            yield call, player

    def answered(self, call: Call, player: object, token_ids: Sequence[int], now_s: float) -> None:
        """The answer has ended: the session goes on."""
        assert isinstance(player, _Player)
        self.open_calls -= 1
        session, following = call.session, call.turn + 1
        if following < len(session.turns):
            later = [_parent(session, turn) for turn in range(following, len(session.turns))]
            player.histories[call.turn] = call.token_ids + list(token_ids)
            player.histories = {turn: tokens for turn, tokens in player.histories.items() if turn in later}
            self._push(player, following, now_s)
        elif self._closed and self.wants_next:
            self._start_next(now_s, player)

    def _start_next(self, now_s: float, player: _Player | None = None) -> None:
        session = next(self._rest, None)
        if session is None:
            return
        if player is None:
            player = _Player(next(self._clients), session)
        player.session, player.histories = session, {}
        self._start(player, now_s)

    def _start(self, player: _Player, now_s: float) -> None:
        if player.session.turns:
            self._push(player, 0, now_s)

    def _push(self, player: _Player, turn: int, now_s: float) -> None:
        due_s = now_s + player.session.turns[turn].think_s
        heapq.heappush(self._due, (due_s, next(self._order), player, turn))

    def _tokens(self, player: _Player, turn: int) -> list[int]:
        parent = _parent(player.session, turn)
        tokens = list(player.histories[parent]) if parent >= 0 else []
        for segment in player.session.turns[turn].prompt:
            tokens += [segment.content % (self._vocab_size - 1) + 1] * segment.tokens
        return tokens
