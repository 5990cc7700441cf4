"""When conversations come back: predicted from how long their last answer was, and learned from those that have.

A conversation whose request has ended *sleeps* until a request arrives whose prompt goes on from it. People read before
they write, so that the gap grows with the answer (Bidaw, FAST'26; the client model of FlashGen §5.1). How fast is not
assumed: each return corrects a running regression of the gap on the answer's tokens. Where that says little, as of
agents, or before enough has been seen, no gap is predicted: then a conversation is expected at the time when it ended,
the one that has slept longest is the least likely to return, and what follows is LRU.

Of a conversation that is overdue less is expected the longer it is, for many have ended for good: its return is taken
to be as far away as its predicted time has passed. So `distance_s` is that of the predicted time from now, on either
side; `eviction.by_return` goes by the same.

A return is known by its prompt going on from the answer, token for token. Where a template leaves out what was answered
(as it may the reasoning), none is seen, nothing is learned, and nothing predicted.

Pure bookkeeping over keys and times: it reads no clock, and does not know the tiers.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

ENOUGH = 32
"""Returns that have been seen before any is predicted."""
MEMORY = 512
"""Returns after which one weighs 1/e."""
TRUSTED = 0.5
"""Predictions count while their mean error is at most this share of the mean gap. For gaps that follow an exponential
distribution, whatever the answer, it is 2/e = 0.74."""
OUTLIER = 4.0
"""Mean errors that one return may be off by: who has gone to lunch counts as that late."""


@dataclass(slots=True)
class GapModel:
    """Seconds from an answer to the next question: `offset + slope · tokens of the answer`, by weighted least squares.

    What was seen n returns ago weighs exp(-n/MEMORY).
    """

    seen: int = 0
    mean_s: float = 0.0
    error_s: float = 0.0
    """Mean of the errors that predictions had when they were made."""
    _weight: float = 0.0
    _mean_tokens: float = 0.0
    _variance: float = 0.0
    _covariance: float = 0.0

    @property
    def slope_s(self) -> float:
        """Seconds for each token of the answer."""
        return self._covariance / self._variance if self._variance > 0 else 0.0

    @property
    def trusted(self) -> bool:
        return self.seen >= ENOUGH and self.error_s <= TRUSTED * self.mean_s

    def gap_s(self, answer_tokens: int) -> float:
        """The predicted gap; 0 where nothing can be predicted."""
        return self._fit_s(answer_tokens) if self.trusted else 0.0

    def observe(self, answer_tokens: int, gap_s: float) -> None:
        """A conversation has come back so long after an answer of so many tokens."""
        fit_s = self._fit_s(answer_tokens)
        if self.seen >= ENOUGH:
            most_s = OUTLIER * self.error_s
            gap_s = max(fit_s - most_s, min(fit_s + most_s, gap_s))
        self.seen += 1
        self._weight = 1 + self._weight * (1 - 1 / MEMORY)
        share = 1 / self._weight
        if self.seen > 2:  # two points fit any line
            self.error_s += max(share, 1 / (self.seen - 2)) * (abs(gap_s - fit_s) - self.error_s)
        off_tokens, off_s = answer_tokens - self._mean_tokens, gap_s - self.mean_s
        self._mean_tokens += share * off_tokens
        self.mean_s += share * off_s
        self._variance = (1 - share) * (self._variance + share * off_tokens * off_tokens)
        self._covariance = (1 - share) * (self._covariance + share * off_tokens * off_s)

    def _fit_s(self, answer_tokens: int) -> float:
        return max(0.0, self.mean_s + self.slope_s * (answer_tokens - self._mean_tokens))


@dataclass(slots=True, eq=False)
class Sleep:
    """A conversation between two requests."""

    keys: Sequence[bytes]
    """Of all its full blocks, in order; none once it sleeps no more."""
    num_tokens: int
    """Of all that was said."""
    answer_tokens: int
    end_s: float
    due_s: float
    """When it is predicted to return."""
    read_ahead: int = 0
    """Blocks on the host that were read ahead for it."""

    @property
    def leaf(self) -> bytes:
        return self.keys[-1]

    def distance_s(self, now_s: float) -> float:
        """How far away its return is taken to be."""
        return abs(self.due_s - now_s)


class Returns:
    """The conversations that sleep, and which of them the host has lost blocks of."""

    def __init__(self, most_blocks: int) -> None:
        """`most_blocks`: of all of them together, at most, or of a single longer one. Those that have slept longest
        are forgotten."""
        self.model = GapModel()
        self._most_blocks = most_blocks
        self._num_blocks = 0
        self._sleeping: OrderedDict[bytes, Sleep] = OrderedDict()
        self._away: list[tuple[float, bytes]] = []  # (due_s, leaf), in order

    def __len__(self) -> int:
        return len(self._sleeping)

    def sleep(self, keys: Sequence[bytes], num_tokens: int, answer_tokens: int, now_s: float) -> Sleep:
        """A request has ended, whose conversation may go on after these full blocks, one at least."""
        self._end(keys[-1])
        due_s = now_s + self.model.gap_s(answer_tokens)
        self._sleeping[keys[-1]] = sleep = Sleep(keys, num_tokens, answer_tokens, now_s, due_s)
        self._num_blocks += len(keys)
        while self._num_blocks > self._most_blocks and len(self._sleeping) > 1:
            self._end(next(iter(self._sleeping)))
        return sleep

    def wake(self, leaf: bytes, num_tokens: int, now_s: float) -> Sleep | None:
        """A request of so many tokens has arrived, of whose prompt all blocks up to `leaf` are known: the conversation
        that slept there, if one did. A prompt that goes on from a conversation lies in the tiers up to its leaf, and no
        farther; one that is no longer than what was said asks the same again."""
        sleep = self._sleeping.get(leaf)
        if sleep is None or num_tokens <= sleep.num_tokens:
            return None
        self._end(leaf)
        self.model.observe(sleep.answer_tokens, now_s - sleep.end_s)
        return sleep

    def due_s(self, leaf: bytes) -> float | None:
        """When the conversation that sleeps there is predicted to return; None if none does."""
        sleep = self._sleeping.get(leaf)
        return None if sleep is None else sleep.due_s

    def leaves(self, key: bytes) -> None:
        """The host has lost a block. Of a conversation the leaf goes first."""
        sleep = self._sleeping.get(key)
        if sleep is not None and not self._is_away(sleep):
            insort(self._away, (sleep.due_s, sleep.leaf))

    def is_back(self, sleep: Sleep) -> None:
        """The host has all blocks of it again, or will not get those that are missing."""
        if self._is_away(sleep):
            del self._away[bisect_left(self._away, (sleep.due_s, sleep.leaf))]

    def soonest_away(self, now_s: float) -> Sleep | None:
        """Of those that the host has lost blocks of, the one whose return is nearest."""
        at = bisect_left(self._away, (now_s, b""))
        near = min(self._away[max(0, at - 1) : at + 1], key=lambda entry: abs(entry[0] - now_s), default=None)
        return None if near is None else self._sleeping[near[1]]

    def _is_away(self, sleep: Sleep) -> bool:
        entry = (sleep.due_s, sleep.leaf)
        at = bisect_left(self._away, entry)
        return at < len(self._away) and self._away[at] == entry

    def _end(self, leaf: bytes) -> Sleep | None:
        sleep = self._sleeping.pop(leaf, None)
        if sleep is not None:
            self.is_back(sleep)
            self._num_blocks -= len(sleep.keys)
            sleep.keys = ()
        return sleep
