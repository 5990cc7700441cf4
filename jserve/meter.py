"""How quickly an engine has lately done its work: what predictions rest on where no cost model is calibrated.

Running means over the last seconds; owned by the engine's thread. It reads no clock: it is told.
"""

from __future__ import annotations

import math

MEMORY_S = 10.0
"""What is older than this counts for less than a third."""
TELLING_TOKENS = 64
"""A step of fewer tells what a step takes at least, and not what a token takes."""


class Meter:
    """Seconds a prompt token, seconds a step, and blocks that ending requests give back a second."""

    def __init__(self) -> None:
        self.prefill_token_s = 0.0
        self.step_s = 0.0
        self.freed_blocks_per_s = 0.0
        self._last_s: float | None = None

    def step(self, start_s: float, end_s: float, tokens: int, prefill: bool, freed_blocks: int, steps: int = 1) -> None:
        """A step (or `steps` in one plan) has ended. `tokens`: of one step; `prefill`: whether prompts are in it."""
        since_s = start_s if self._last_s is None else max(start_s, self._last_s)
        taken_s = end_s - since_s
        if self._last_s is None:
            self._last_s = start_s
        elapsed_s = end_s - self._last_s
        self._last_s = end_s
        if taken_s <= 0 or elapsed_s <= 0:
            return
        share = 1 - math.exp(-elapsed_s / MEMORY_S)
        self.step_s = _mean(self.step_s, taken_s / steps, share)
        if prefill and tokens >= TELLING_TOKENS:
            self.prefill_token_s = _mean(self.prefill_token_s, taken_s / tokens, share)
        self.freed_blocks_per_s += share * (freed_blocks / elapsed_s - self.freed_blocks_per_s)


def _mean(before: float, now: float, share: float) -> float:
    return now if not before else before + share * (now - before)
