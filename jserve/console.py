"""What jserve shows in a terminal: progress bars and notes, on stderr, so that stdout holds results alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from jserve.progress import Task


@dataclass(frozen=True)
class _Bar:
    bars: Progress
    id: TaskID

    def advance(self, amount: float = 1) -> None:
        self.bars.advance(self.id, amount)


class RichProgress:
    """`jserve.progress.Progress` on a terminal. Without one, each bar is a single line at its end."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def track(self, title: str, total: float, unit: str = "") -> Iterator[Task]:
        counts: list[ProgressColumn] = (
            [DownloadColumn(), TransferSpeedColumn()] if unit == "B" else [MofNCompleteColumn()]
        )
        columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn())
        with Progress(*columns, console=self._console) as bars:
            yield _Bar(bars, bars.add_task(title, total=total))

    def note(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)
