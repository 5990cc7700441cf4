"""What every benchmark says at its end: tables for people, and one JSON object for machines.

With `--json` the tables go to stderr and the last line of stdout is the object: bench, metrics (name to number),
config, machine, versions, commit, seed. `--save` writes the same object to `bench/results/`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jserve")


@dataclass(frozen=True)
class Result:
    """One run of one benchmark."""

    bench: str
    metrics: Mapping[str, float]
    config: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the compared systems; python, jax and the like are added."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """What could not be measured, and why."""

    def document(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "metrics": {name: _rounded(value) for name, value in self.metrics.items()},
            "missing": dict(self.missing),
            "config": dict(self.config),
            "machine": machine(),
            "versions": {**versions(), **self.versions},
            "commit": commit(),
            "seed": self.seed,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout; tables go to stderr")
    parser.add_argument(
        "--save", nargs="?", const="", metavar="LABEL", help="write the JSON to bench/results/NAME-LABEL.json (today)"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the work (default 0)")


def console(args: argparse.Namespace) -> Console:
    """Where people read: stdout, or stderr if stdout is for JSON."""
    return Console(stderr=args.json, highlight=False)


def note(console: Console, text: str) -> None:
    """One line, as it is."""
    console.print(text, soft_wrap=True, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Names on the left, numbers on the right."""
    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    for row in rows:
        made.add_row(*(_shown(value) for value in row))
    return made


def emit(result: Result, args: argparse.Namespace) -> None:
    """Print and save what was asked for."""
    document = result.document()
    if args.save is not None:
        path = path_of(result, args)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n")
        note(console(args), f"saved {path.relative_to(ROOT)}")
    if args.json:
        print(json.dumps(document), flush=True)


def path_of(result: Result, args: argparse.Namespace) -> Path:
    """Where `--save` puts it."""
    return RESULTS / f"{result.bench}-{args.save or time.strftime('%Y-%m-%d')}.json"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader") or None,
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The commit under test; `-dirty` if files differ from it."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not head:
        return "unknown"
    return head + ("-dirty" if _output("git", "-C", str(ROOT), "status", "--porcelain") else "")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _rounded(value: float) -> float:
    """Five digits: more would be noise. Whole numbers stay whole."""
    return value if isinstance(value, int) else float(f"{value:.5g}")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
