"""What the engine's memory and batch looked like while work was played: means over its steps, in any world."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from jserve.engine import Engine
from jserve.sched.plan import StepPlan
from jserve.simulation.playing import Played

SAMPLES = 2048


class Sample(msgspec.Struct, frozen=True, gc=False):
    """The engine over a stretch of time, in its mean."""

    time_s: float
    """The end of the stretch."""
    span_s: float
    held: float
    """Share of the device's blocks that requests hold."""
    cached: float
    """Share whose KV is kept for nobody in particular."""
    running: float
    waiting: float


@dataclass
class Gauges:
    """Means over the time since they were made, kept as samples whose number is bounded: when there are too many, pairs
    are joined."""

    engine: Engine
    samples: list[Sample] = field(default_factory=list)
    _start_s: float = field(init=False)
    _span_s: float = 0.0

    def __post_init__(self) -> None:
        self._start_s = self.engine.clock.now()

    def see(self, plan: StepPlan, seconds: float, *, ended: bool = False) -> None:
        """A step was launched that takes so long; or has `ended`, and took so long."""
        pool, scheduler = self.engine.cache.pool, self.engine.scheduler
        blocks = pool.num_blocks
        held, cached = (blocks - pool.num_free) / blocks, pool.num_reclaimable / blocks
        now_s = self.engine.clock.now() - self._start_s
        new = Sample(now_s if ended else now_s + seconds, seconds, held, cached, len(plan.rows), scheduler.num_waiting)
        last = self.samples[-1] if self.samples else None
        if last is not None and last.span_s + seconds <= self._span_s:
            self.samples[-1] = _joined(last, new)
        else:
            self.samples.append(new)
        if len(self.samples) > SAMPLES:
            pairs = zip(self.samples[::2], self.samples[1::2], strict=False)
            self.samples = [_joined(a, b) for a, b in pairs]
            self._span_s = 2 * max(self._span_s, now_s / SAMPLES / 2)

    def mean(self, name: str, since_s: float = 0.0) -> float:
        """Over the time in which a step ran."""
        counted = [sample for sample in self.samples if sample.time_s > since_s]
        spans = sum(sample.span_s for sample in counted)
        return sum(getattr(s, name) * s.span_s for s in counted) / spans if spans else 0.0


def _joined(a: Sample, b: Sample) -> Sample:
    span = a.span_s + b.span_s

    def mean(of_a: float, of_b: float) -> float:
        return (of_a * a.span_s + of_b * b.span_s) / span if span else 0.0

    return Sample(
        b.time_s,
        span,
        mean(a.held, b.held),
        mean(a.cached, b.cached),
        mean(a.running, b.running),
        mean(a.waiting, b.waiting),
    )


@dataclass
class Observed:
    """A workload that was played, and what was seen meanwhile."""

    played: Played
    gauges: Gauges
