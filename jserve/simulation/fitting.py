"""A cost model's steps from a real run: what each step of an engine held, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

from jserve.cache.cost import DecodeCost, PrefillCost
from jserve.cache.cost_fit import fit_decode, fit_prefill
from jserve.doors import Clock, Executor, LaunchedStep, StepResult
from jserve.errors import ConfigError
from jserve.sched.plan import StepPlan
from jserve.simulation.doors import Spread

WILD = 2.0
"""A step that took more than so many times what the fit says was disturbed: it is left out of the next fit."""
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class StepSample:
    """One step of a real engine."""

    decodes: int
    context: int
    """Tokens that the decodes attend to, all together."""
    tokens: int
    """All of the step's."""
    pairs: float
    """Queries and keys that prefill chunks bring together."""
    seconds: float

    @property
    def is_decode(self) -> bool:
        return self.tokens == self.decodes


class RecordingExecutor:
    """An executor that notes what each step holds and takes, from the end of the one before, or its own launch."""

    def __init__(self, inner: Executor, clock: Clock) -> None:
        self._inner, self._clock = inner, clock
        self._ended_s = 0.0
        self.samples: list[StepSample] = []
        self.on_end: Callable[[StepPlan, float], None] = lambda plan, seconds: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        decodes = plan.num_decodes
        context = sum(row.start + 1 for row in plan.rows[:decodes])
        pairs = sum(row.count * (row.start + row.count / 2) for row in plan.rows[decodes:])
        start_s = self._clock.now()

        def ended() -> None:
            now_s = self._clock.now()
            seconds = now_s - max(start_s, self._ended_s)
            self._ended_s = now_s
            self.samples.append(StepSample(decodes, context, plan.num_tokens, pairs, seconds))
            self.on_end(plan, seconds)

        return _Recorded(self._inner.launch(plan), ended)


@dataclass(slots=True)
class _Recorded:
    inner: LaunchedStep
    ended: Callable[[], None]

    @property
    def pack_s(self) -> float:
        return self.inner.pack_s

    def read(self) -> StepResult:
        result = self.inner.read()
        self.ended()
        return result


def fit_steps(samples: Sequence[StepSample]) -> tuple[PrefillCost, DecodeCost, Spread]:
    """What `StepTime` makes of them, turned round. ConfigError if there are no steps of both kinds."""
    decodes = [s for s in samples if s.is_decode and s.seconds > 0]
    mixed = [s for s in samples if not s.is_decode and s.seconds > 0]
    if len(decodes) < 8 or len(mixed) < 8:
        raise ConfigError(f"{len(decodes)} decode and {len(mixed)} prefill steps are too few to fit: let more work run")
    decode = _fit(decodes, lambda kept: fit_decode((s.decodes, s.context, s.seconds) for s in kept), _decode_s)
    per_context_s = decode.per_context_token_s

    def prefill_of(kept: Sequence[StepSample]) -> PrefillCost:
        # A chunk of n tokens after c: n·(c + n/2) pairs. What the decodes read in the same step comes on top.
        return fit_prefill(
            (
                s.tokens,
                round(s.pairs / s.tokens - s.tokens / 2),
                max(s.seconds / 2, s.seconds - per_context_s * s.context),
            )
            for s in kept
        )

    def prefill_s(fitted: PrefillCost, s: StepSample) -> float:
        return (
            fitted.overhead_s + fitted.per_token_s * s.tokens + fitted.per_pair_s * s.pairs + per_context_s * s.context
        )

    prefill = _fit(mixed, prefill_of, prefill_s)
    spread = Spread(_ratios(decodes, decode, _decode_s), _ratios(mixed, prefill, prefill_s))
    return prefill, decode, spread


def _decode_s(fitted: DecodeCost, s: StepSample) -> float:
    return fitted.seconds(s.decodes, s.context)


C = TypeVar("C", PrefillCost, DecodeCost)


def _fit(
    samples: Sequence[StepSample], fit: Callable[[Sequence[StepSample]], C], predict: Callable[[C, StepSample], float]
) -> C:
    """Fitted again without what was disturbed."""
    kept = list(samples)
    for _ in range(ROUNDS):
        fitted = fit(kept)
        middle = median(s.seconds / predict(fitted, s) for s in kept)
        calm = [s for s in kept if 1 / WILD < s.seconds / predict(fitted, s) / middle < WILD]
        if len(calm) == len(kept) or len(calm) < len(samples) / 2:
            break
        kept = calm
    return fitted


def _ratios(samples: Sequence[StepSample], fitted: C, predict: Callable[[C, StepSample], float]) -> tuple[float, ...]:
    """Of the calm ones. Their mean is a little above 1: where times vary, the least relative error lies below it."""
    ratios = [s.seconds / predict(fitted, s) for s in samples]
    middle = median(ratios)
    return tuple(ratio for ratio in ratios if 1 / WILD < ratio / middle < WILD)
