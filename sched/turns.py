"""Turns: in the order `pace`, an answer that is far ahead of its reader gives its place to those who wait for theirs.

People read slower than a device answers while it is not crowded, and the lead can be spent on others, unseen (Andes,
arXiv 2404.16283, which preempts by the quality that each user experiences). Whoever starts has a turn of `turn_tokens`
at its rank of arrival. Once that is over, and while its next token is not due before `ahead_s` from now, it ranks by
when that is due: it yields to whoever needs a token sooner, and waits behind them. When it starts again, it begins
another turn, so that every preemption pays for its copies.

Under lasting overload nobody who runs is ahead, and the order becomes that of arrival. While one waits, its rank stays:
whoever arrives once its reader has caught up ranks behind it, so that nobody starves.
"""

from __future__ import annotations

from dataclasses import dataclass

from jserve.sched.order import Rank
from jserve.sched.sequence import Sequence

LOOK_TOKENS = 32
"""Tokens between two looks at one whose turn is over."""


@dataclass(frozen=True, slots=True)
class Turns:
    """How long a turn is, and how far ahead of its reader one must be to lose its place after it."""

    turn_tokens: int = 128
    ahead_s: float = 40.0

    def begin(self, sequence: Sequence) -> None:
        """It starts, for the first time or again."""
        sequence.rank = sequence.arrival_rank
        sequence.turn_limit = sequence.num_output + self.turn_tokens

    def over(self, sequence: Sequence, slo_tpot_s: float, now_s: float) -> Rank:
        """It goes on after its turn: what it ranks until the next look, of a reader at `slo_tpot_s` a token."""
        sequence.turn_limit = sequence.num_output + LOOK_TOKENS
        first_due_s, place = sequence.arrival_rank
        next_due_s = first_due_s + slo_tpot_s * sequence.num_output
        return next_due_s if next_due_s - now_s >= self.ahead_s else first_due_s, place
