"""A JAX profiler trace of some steps in the middle of serving, and how long each phase of them took.

The phases are named where they happen: schedule, stage (copies between the tiers: what has ended, what starts), load
(host to device), forward, sample, wait (for the device) and commit. Forward and sample are the launches; what the
device does for them is told by program. The trace opens in xprof and TensorBoard, and in Perfetto.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.profiler import ProfileData

from jserve.errors import ConfigError

PHASES = ("schedule", "stage", "load", "forward", "sample", "wait", "commit")


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """One phase of the engine's thread, or one program of the device, over the whole window."""

    name: str
    calls: int
    total_s: float


class StepWindow:
    """Traces `steps` steps after the first `skip`, into `directory`."""

    def __init__(self, directory: Path, skip: int, steps: int, note: Callable[[str], None]) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot write a profile to {directory} ({error.strerror}): choose another directory"
            ) from None
        self._directory, self._skip, self._steps, self._note = directory, skip, steps, note
        self._launched = 0
        self._tracing = False

    def launch(self) -> None:
        """A step is about to be launched."""
        if self._launched == self._skip:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would drown the phases
            jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True, profiler_options=options)
            self._tracing = True
        elif self._launched == self._skip + self._steps:
            self.close()
        self._launched += 1

    def close(self) -> None:
        """End the trace, whole or not, and tell where the time went."""
        if not self._tracing:
            if self._launched <= self._skip:
                said = f"all {self._launched} steps came before its window: skip fewer than {self._skip}"
                self._note(f"no profile in {self._directory}: {said}")
            return
        self._tracing = False
        jax.profiler.stop_trace()
        steps = self._launched - self._skip
        self._note(f"profile of {steps} steps in {self._directory}\n{table(read_phases(self._directory), steps)}")


def read_phases(directory: Path) -> list[PhaseTime]:
    """The phases and device programs of the newest trace under a directory. Raises ConfigError if there is none."""
    traces = sorted(directory.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise ConfigError(f"there is no profile in {directory}: its window of steps was never reached")
    phases = {name: PhaseTime(name, 0, 0.0) for name in PHASES}
    programs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for plane in ProfileData.from_file(str(traces[-1])).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in phases:
                    so_far = phases[event.name]
                    total_s = so_far.total_s + event.duration_ns / 1e9
                    phases[event.name] = PhaseTime(event.name, so_far.calls + 1, total_s)
                elif event.duration_ns and (module := dict(event.stats).get("hlo_module")):
                    programs[str(module)].append((event.start_ns, event.start_ns + event.duration_ns))
    on_device = [PhaseTime(f"device: {name}", 0, _covered(spans) / 1e9) for name, spans in sorted(programs.items())]
    return [phase for phase in phases.values() if phase.calls] + on_device


def table(phases: Iterable[PhaseTime], steps: int | None = None) -> str:
    """For people: total, by call and by step."""
    lines = [f"{'phase':<34}{'calls':>8}{'total ms':>12}{'ms a call':>12}" + (f"{'ms a step':>12}" if steps else "")]
    for phase in phases:
        total_ms = 1e3 * phase.total_s
        calls, each = (f"{phase.calls}", f"{total_ms / phase.calls:.3f}") if phase.calls else ("", "")
        line = f"{phase.name:<34}{calls:>8}{total_ms:>12.2f}{each:>12}"
        lines.append(line + (f"{total_ms / steps:>12.3f}" if steps else ""))
    return "\n".join(lines)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union: a program runs on several threads or streams at once."""
    covered, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return covered
