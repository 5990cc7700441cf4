"""Progress of long work (loading, compiling, downloading), told to whoever shows it.

Work code calls `Progress.track`; the command line shows rich bars on stderr, everything else stays silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Task(Protocol):
    def advance(self, amount: float = 1) -> None: ...


class Progress(Protocol):
    """Shows bars and notes. `track` opens a bar that closes with its `with` block."""

    def track(self, title: str, total: float, unit: str = "") -> Any:
        """A context manager that gives a `Task`. `unit` "B" shows sizes and rates in bytes."""

    def note(self, text: str) -> None:
        """A line that stays."""


class _NoTask:
    def advance(self, amount: float = 1) -> None:
        del amount


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def track(self, title: str, total: float, unit: str = "") -> Iterator[Task]:
        del title, total, unit
        yield _NoTask()

    def note(self, text: str) -> None:
        del text
