"""What one step does: the only thing that the scheduler tells an executor."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from jserve.sched.sequence import Sequence


class Row(msgspec.Struct, gc=False):
    """Compute `count` tokens of `sequence` from position `start`; if `samples`, choose the token that follows."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(slots=True)
class StepPlan:
    """One batch. Decodes come first, then prefill chunks."""

    rows: list[Row] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    """Sequences that got a slot in this step: the executor sets up their sampling state first."""
    num_tokens: int = 0
    num_decodes: int = 0
    """Leading rows that are decodes: one token each, which may still be in flight, and each samples."""
    steps: int = 1
    """Above 1, where the caller has allowed it: so many decode steps in a row, of one token a row each. Row i computes
    positions start to start + steps - 1 and samples `steps` tokens."""

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.num_tokens += row.count
