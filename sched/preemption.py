"""How a request that has to yield comes back: computed again, or swapped out to host memory and back.

A policy decides for one victim, from what the cache's cost model says of it (`cache.cost.swap_or_recompute`, after
"Uncover the Overhead and Resource Usage for Handling KV Cache Overflow in LLM Inference", SC'24).

Either way preemption is partial: what a victim gives back becomes free, but with prefix caching its full blocks stay
findable until they are taken, from its tail on. When it comes back, only those that somebody needed are missing.
"""

from __future__ import annotations

from collections.abc import Callable

from jserve.cache.cost import SwapDecision
from jserve.errors import ConfigError

Swaps = Callable[[SwapDecision], bool]
"""Whether to swap one victim out."""


def recompute(decision: SwapDecision) -> bool:
    """Never: what is given back is computed again, or found where it was kept anyway."""
    return False


def swap(decision: SwapDecision) -> bool:
    """Always: what the host has not got yet is copied there."""
    return True


def auto(decision: SwapDecision) -> bool:
    """Whatever is predicted to be quicker for this victim."""
    return decision.swap


PREEMPTIONS: dict[str, Swaps] = {"recompute": recompute, "swap": swap, "auto": auto}


def preemption_named(name: str) -> Swaps:
    """Raises ConfigError for a name that is none."""
    if name not in PREEMPTIONS:
        raise ConfigError(f"there is no way of preemption {name!r}: use one of {', '.join(PREEMPTIONS)}")
    return PREEMPTIONS[name]
