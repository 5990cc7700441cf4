"""Runs a Pallas function compiled on GPUs, and interpreted on CPUs, as tests do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


def by_platform(function: Callable[..., Any], *operands: Any) -> Any:
    """`function(*operands, interpret=...)`; which of the two is decided where the program is lowered."""
    return jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(function, interpret=True),
        default=functools.partial(function, interpret=False),
    )
