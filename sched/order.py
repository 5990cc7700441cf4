"""Who comes first: the order of the queue, as one number a request. The least goes first; equals, in order of arrival.

A rank is given when a request arrives, from what is known then. That is enough for most of these orders: even the
slack until a deadline shrinks for everybody alike, so that it never changes who has less of it. Whoever ranks higher
yields to whoever ranks lower (`scheduler`): it never keeps a lower rank waiting beyond its own preemption.

In the order `pace` an answer that is far ahead of its reader has a higher rank for as long as that is so (`turns`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jserve.errors import ConfigError

Rank = tuple[float, int]
"""What an order says, and the place in the order of arrival."""

AGING = 64
"""Requests of later arrival that a long prefix may overtake, at most: its aging bound."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, as it arrives."""

    place: float
    """In the order of arrival, or in the fair order of its tenant's requests among the others' (`admission`)."""
    arrival_s: float = 0.0
    priority: int = 0
    slo_ttft_s: float = 0.0
    prefill_s: float = 0.0
    """What computing its prompt is predicted to take."""
    cached_blocks: int = 0
    """Leading blocks of its prompt that need not be computed."""


@dataclass(frozen=True, slots=True)
class Order:
    """One order."""

    rank: Callable[[Arrival], float]
    passes: bool
    """Whether one that does not fit is passed by later ones that do, until it fits into what they hold (FlashGen)."""
    by_prefix: bool = False
    """Whether it has to know how much of a prompt is kept."""
    turns: bool = False
    """Whether ranks, which are times then, move with the reader (`turns`)."""


def by_arrival(request: Arrival) -> float:
    """First come, first served."""
    return request.place


def by_priority(request: Arrival) -> float:
    """The highest priority first. Low ones wait for as long as higher ones come."""
    return -request.priority


def by_slack(request: Arrival) -> float:
    """Whoever has to start soonest to have its first token in time: deadline less prefill, on the engine's clock."""
    return request.arrival_s + request.slo_ttft_s - request.prefill_s


def by_first_token(request: Arrival) -> float:
    """When its first token is due, on the engine's clock: the order of arrival where all have the same target."""
    return request.arrival_s + request.slo_ttft_s


def by_prefix(request: Arrival) -> float:
    """Before up to AGING others, one place for each block of its prompt that is kept: short work goes first."""
    return request.place - min(request.cached_blocks, AGING)


ORDERS = {
    "fcfs": Order(by_arrival, passes=False),
    "flashgen": Order(by_arrival, passes=True),
    "priority": Order(by_priority, passes=True),
    "slo": Order(by_slack, passes=True),
    "pace": Order(by_first_token, passes=True, turns=True),
    "prefix": Order(by_prefix, passes=True, by_prefix=True),
}


def order_named(name: str) -> Order:
    """Raises ConfigError for a name that is none."""
    if name not in ORDERS:
        raise ConfigError(f"there is no order {name!r}: use one of {', '.join(ORDERS)}")
    return ORDERS[name]
