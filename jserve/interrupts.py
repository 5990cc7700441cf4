"""Ctrl-C and SIGTERM at the command line: whatever a command is doing, it ends soon, with one line and a status.

The first signal is a KeyboardInterrupt, which takes bars, temporary files and children away as it passes. The process
ends where it stands if a library swallows that, if something does not end for `PATIENCE_S`, at a second signal, and
during an import: there is little to take away then, and extension modules crash when an exception meets them there.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

PATIENCE_S = 1.0
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it, and whoever drew the bar may have been killed
_scratch: set[Path] = set()


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder that does not outlive the block, nor a process that a signal ends inside of it."""
    import shutil

    _scratch.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _scratch.discard(folder)


class Interrupts:
    """`with Interrupts("jserve"): ...` on the main thread. Without a signal it changes nothing.

    The exit status is 128 plus the signal's number, as shells have it, unless `statuses` is changed.
    """

    def __init__(self, name: str) -> None:
        self.statuses = {int(number): 128 + number for number in (signal.SIGINT, signal.SIGTERM)}
        self._name = name
        self._first: int | None = None
        self._ending = threading.Lock()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        # also where SIGINT is ignored, as for a job in the background of a script: who sends it means it
        self._before = {number: signal.signal(number, self._take) for number in self.statuses}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first is not None:  # then the exception, of whatever kind by now, is its consequence
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            self._end(self._first)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._first is not None or _importing(frame):
            self._end(self._first or number)
            return
        self._first = number
        logging.disable()  # what libraries say about being left in the middle would hide the one line
        sys.excepthook = lambda *_: None  # for C extensions that print what stopped their import
        sys.unraisablehook = lambda _: None
        threading.excepthook = lambda _: None
        _thread.start_new_thread(self._end_later, (number,))  # threading's own locks may be held where we are
        raise KeyboardInterrupt

    def _end_later(self, number: int) -> None:
        time.sleep(PATIENCE_S)
        self._end(number)

    def _end(self, number: int) -> None:
        """End the process; if it is ending already, return to that."""
        if not self._ending.acquire(blocking=False):
            return
        for folder in list(_scratch):
            import shutil

            shutil.rmtree(folder, ignore_errors=True)
        line = f"{self._name}: ended by {signal.Signals(number).name}\n"
        with suppress(OSError):  # not through sys.stderr, whose lock may be held where we are
            os.write(2, (f"{_SHOW_CURSOR}\n{line}" if os.isatty(2) else line).encode())
        os._exit(self.statuses[number])


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
