"""A tier that has failed or hangs is not read, or not written, for a while, and is tried again later.

The pause doubles with each further fault. Reading and writing fail apart: a full disk can still be read, and so can a
host that has no memory for more.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(slots=True)
class Pause:
    """Whether one direction can be trusted at the moment."""

    until_s: float = 0.0
    next_s: float = FIRST_PAUSE_S

    def is_over(self, now_s: float) -> bool:
        return now_s >= self.until_s

    def fault(self, now_s: float) -> bool:
        """The tier has failed; returns whether it is the first time since it last worked."""
        first = self.next_s == FIRST_PAUSE_S
        self.until_s = now_s + self.next_s
        self.next_s = min(2 * self.next_s, LONGEST_PAUSE_S)
        return first

    def works(self) -> None:
        self.next_s = FIRST_PAUSE_S

    def end(self) -> None:
        """Try again at once."""
        self.until_s = 0.0
