"""What one step does: the only thing that the scheduler tells an executor."""

from __future__ import annotations

from dataclasses import dataclass, field

from jserve.sched.sequence import Sequence


@dataclass(slots=True)
class Row:
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

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.num_tokens += row.count
