"""`--profile DIR` of every benchmark that runs an engine or a device: a JAX profiler trace, and the time by phase.

An engine traces a window of steps (`jserve.profiler.StepWindow`), which its runner's settings choose: `of(args)` gives
them, and `flags_of(args)` the same for `jserve serve`. Where one runner serves many engines, `steps` traces a window of
one of them. A benchmark without an engine is traced whole, by `traced`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from jserve.config import RunnerConfig

if TYPE_CHECKING:
    from jserve.runner import Runner


Parser: TypeAlias = "argparse.ArgumentParser | argparse._ArgumentGroup"


class Window(TypedDict):
    """Settings of a `RunnerConfig`."""

    profile_dir: Path | None
    profile_skip: int
    profile_steps: int


def add_argument(parser: Parser, *, skip: int = RunnerConfig.profile_skip) -> None:
    """`skip`: steps after which this benchmark does what is worth looking at."""
    add_directory(parser, "trace some steps")
    parser.add_argument(
        "--profile-skip", type=int, default=skip, metavar="N", help=f"steps before the trace (default {skip})"
    )
    steps = RunnerConfig.profile_steps
    parser.add_argument(
        "--profile-steps", type=int, default=steps, metavar="N", help=f"steps of the trace (default {steps})"
    )


def add_directory(parser: Parser, what: str = "trace what is measured") -> None:
    """For a benchmark without steps."""
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help=f"{what}, for TensorBoard and Perfetto, and time the phases"
    )


def of(args: argparse.Namespace) -> Window:
    """What the arguments say, for a `RunnerConfig`."""
    return Window(profile_dir=args.profile, profile_skip=args.profile_skip, profile_steps=args.profile_steps)


def flags_of(args: argparse.Namespace) -> list[str]:
    """The same, for a server."""
    if args.profile is None:
        return []
    window = {"dir": args.profile, "skip": args.profile_skip, "steps": args.profile_steps}
    return [part for name, value in window.items() for part in (f"--profile-{name}", str(value))]


@contextmanager
def steps(runner: Runner, window: Window, name: str, note: Callable[[str], None]) -> Iterator[None]:
    """Trace a window of the steps that the runner takes within, into the folder of this name."""
    from jserve.profiler import StepWindow

    directory = window["profile_dir"]
    assert directory is not None
    runner.profile = StepWindow(directory / name, window["profile_skip"], window["profile_steps"], note)
    try:
        yield
    finally:
        runner.profile.close()
        runner.profile = None


def told(args: argparse.Namespace) -> str:
    """What a server that has ended has written. Raises ConfigError if that is nothing."""
    from jserve.profiler import read_phases, table

    return f"profile in {args.profile}\n{table(read_phases(args.profile))}"


@contextmanager
def traced(args: argparse.Namespace, note: Callable[[str], None]) -> Iterator[None]:
    """Trace all that is done within, if that is asked for, and tell where the time went."""
    if args.profile is None:
        yield
        return
    import jax

    args.profile.mkdir(parents=True, exist_ok=True)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(args.profile), create_perfetto_trace=True, profiler_options=options):
        yield
    note(told(args))
