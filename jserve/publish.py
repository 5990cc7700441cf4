"""Files that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jserve.interrupts import scratch


@contextmanager
def publish_directory(target: Path) -> Iterator[Path]:
    """An empty directory to fill; it becomes `target` at the end. If another process was first, its work stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch(Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))) as staging:
        yield staging
        staging.chmod(0o755)
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():
                raise


@contextmanager
def publish_file(target: Path) -> Iterator[Path]:
    """A path to write to; it becomes `target` at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch(Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))) as staging:
        yield staging / target.name
        (staging / target.name).replace(target)
