"""How many tokens a step takes: a constant, or as many as the latency targets leave room for.

Large chunks bring a prompt's first token sooner, and delay everybody's next token. `next_chunk` is Algorithm 1 of
"Revisiting Pipeline Parallelism" (OSDI '26), which the authors of Mutel use to coordinate prefill and decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Chunk = Literal["static", "adaptive"]

STEP_TOKENS = 128
"""By how much a chunk changes at once, and the smallest chunk."""
EVERY_STEPS = 16
"""Scheduled steps between two decisions."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How a server does, against what it shall do."""

    running: int
    free_share: float
    """Of the KV pool."""
    ttft_slack_s: float
    """Until the first token of the request that has waited longest is due; negative if it is late."""
    tpot_slack_s: float
    """What is left between the time that a token takes and the time that it may take."""
    slo_ttft_s: float
    slo_tpot_s: float


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Shares, by their names in the paper."""

    theta_mem: float = 0.05
    alpha: float = 0.8
    beta: float = 0.5
    gamma: float = 0.2


DEFAULT = Thresholds()


def next_chunk(chunk: int, pace: Pace, most: int, thresholds: Thresholds = DEFAULT) -> int:
    """The step's token limit from now on, between STEP_TOKENS (or `most`, if that is less) and `most`."""
    least = min(STEP_TOKENS, most)
    if pace.free_share < thresholds.theta_mem:
        chunk = STEP_TOKENS * (pace.running // STEP_TOKENS + 1)  # the smallest that holds every decode
    elif pace.tpot_slack_s < 0 or pace.ttft_slack_s > thresholds.alpha * pace.slo_ttft_s:
        chunk -= STEP_TOKENS
    elif (
        pace.ttft_slack_s < thresholds.beta * pace.slo_ttft_s and pace.tpot_slack_s > thresholds.gamma * pace.slo_tpot_s
    ):
        chunk += STEP_TOKENS
    return max(least, min(most, chunk))
