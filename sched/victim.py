"""Who of those that may have to yield goes first: a key for each, the greatest first.

Only requests that rank behind the one that needs their blocks are ever asked, whatever the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jserve.errors import ConfigError
from jserve.sched.order import Rank


@dataclass(frozen=True, slots=True)
class Holder:
    """One that holds blocks."""

    rank: Rank
    blocks: int
    tokens: int
    """Computed: what recomputing it would cost."""


Victim = Callable[[Holder], Any]


def youngest(holder: Holder) -> Any:
    """The last of the order: whoever came last has waited least."""
    return holder.rank


def largest(holder: Holder) -> Any:
    """The most blocks: fewest requests are disturbed."""
    return holder.blocks, holder.rank


def cheapest(holder: Holder) -> Any:
    """The fewest computed tokens: least work is lost."""
    return -holder.tokens, holder.rank


VICTIMS: dict[str, Victim] = {"youngest": youngest, "largest": largest, "cheapest": cheapest}


def victim_named(name: str) -> Victim:
    """Raises ConfigError for a name that is none."""
    if name not in VICTIMS:
        raise ConfigError(f"there is no victim policy {name!r}: use one of {', '.join(VICTIMS)}")
    return VICTIMS[name]
