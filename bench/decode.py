"""`python -m bench.decode`: how long one decode step takes, by batch size, on the engine in this process.

Without a server, sockets or text: the model, the paged cache and the step loop alone. `--shape` takes a model's shape
with random weights, so that no checkpoint is needed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax

from bench import profiling, report
from bench.shapes import SHAPES
from bench.timing import copy_bandwidth, stoppable
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.console import RichProgress
from jserve.doors import Executor, LaunchedStep
from jserve.engine import Engine
from jserve.errors import ConfigError, JserveError
from jserve.models.placement import init_random
from jserve.models.registry import parse_config
from jserve.request import EngineRequest, SamplingParams
from jserve.runner import Runner, make_mesh, resolve_dtype
from jserve.sched.plan import StepPlan

BACK_TO_BACK = 32
"""Launches of one step, none read before all are sent, that tell the device's own time."""


@dataclass(frozen=True)
class Measured:
    """Decode steps of one batch size."""

    batch: int
    step_s: float
    """Median, from one token of every row to the next."""
    least_s: float
    """Reading weights and KV once, at copy bandwidth."""
    device_s: float
    """Of the same step when the next one always waits for the device."""
    host_s: float

    @property
    def over_floor(self) -> float:
        return self.step_s / self.least_s

    @property
    def idle_share(self) -> float:
        """How much of a step the device waits for the host."""
        return max(0.0, 1 - self.device_s / self.step_s)


class LastPlan:
    """The engine's executor, which remembers the last plan that it was given."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.plan = StepPlan()

    @property
    def compiles_after_warmup(self) -> int:
        return self._executor.compiles_after_warmup

    def phase(self, name: str) -> AbstractContextManager[object]:
        return self._executor.phase(name)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        self.plan = plan
        return self._executor.launch(plan)

    def close(self) -> None:
        self._executor.close()


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    on_cpu = jax.default_backend() == "cpu"
    bandwidth = copy_bandwidth(1 << 28 if on_cpu else 1 << 30)
    try:
        engine = _engine(args, 256 if on_cpu else 2048)
        executor = engine.executor = LastPlan(engine.executor)
        found, missing = _measure_all(engine, executor, args, bandwidth)
    except JserveError as error:
        print(f"bench.decode: {error}", file=sys.stderr)
        return 2
    columns = ("batch", "step p50 ms", "tokens/s", "least ms", "over least", "host ms", "device ms", "idle")
    rows = [
        (
            *(m.batch, m.step_s * 1e3, m.batch / m.step_s, m.least_s * 1e3, m.over_floor),
            *(m.host_s * 1e3, m.device_s * 1e3, m.idle_share),
        )
        for m in found
    ]
    report.console(args).print(report.table(f"decode, {engine.info.model}, {engine.info.backend}", columns, rows))
    settings: dict[str, Any] = {"model": engine.info.model, "dtype": engine.info.dtype, "backend": engine.info.backend}
    settings |= {"batch": args.batch, "context": args.context, "steps": args.steps, "copy_bytes_per_s": bandwidth}
    metrics = metrics_of(found) | {"compiles_after_warmup": engine.stats().compiles_after_warmup}
    report.emit(report.Result("decode", metrics, settings, args.seed, missing=missing), args)
    return 0 if found else 1


def metrics_of(found: Sequence[Measured]) -> dict[str, float]:
    """By batch size; what is claimed of all of them is the worst."""
    metrics: dict[str, float] = {}
    for m in found:
        metrics |= {f"step_ms_{m.batch}": m.step_s * 1e3, f"tokens_per_s_{m.batch}": m.batch / m.step_s}
        metrics |= {f"host_step_ms_{m.batch}": m.host_s * 1e3, f"device_step_ms_{m.batch}": m.device_s * 1e3}
    if found:
        metrics["decode_step_over_floor"] = max(m.over_floor for m in found)
        metrics["idle_share"] = max(m.idle_share for m in found)
    return metrics


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--model", help="directory, GGUF file or hub id (default: the embedded model)")
    parser.add_argument("--shape", choices=SHAPES, help="a shape with random weights instead of a model")
    parser.add_argument("--batch", type=_counts, default=[1, 4, 8, 16, 32, 64], help="batch sizes (1,4,8,16,32,64)")
    parser.add_argument("--context", type=int, default=512, help="tokens before the first decode (512)")
    parser.add_argument("--steps", type=int, default=48, help="decode steps a batch size (48)")
    parser.add_argument("--device-blocks", type=int, help="KV pool (default: from free memory)")
    parser.add_argument("--attention-backend", choices=("auto", "native", "xla", "pallas"), default="auto")
    profiling.add_argument(parser)
    report.add_arguments(parser)
    return parser


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _engine(args: argparse.Namespace, token_budget: int) -> Engine:
    token_budget = max(token_budget, *args.batch)
    # Of a shape, only the programs that are measured: a large model takes minutes to tune for every bucket.
    buckets = tuple(sorted({*args.batch, token_budget})) if args.shape else None
    config = EngineConfig(
        model=args.model,
        cache=CacheConfig(device_blocks=args.device_blocks),
        sched=SchedConfig(max_running=max(args.batch), token_budget=token_budget if args.shape else None),
        runner=RunnerConfig(attention_backend=args.attention_backend, token_buckets=buckets, **profiling.of(args)),
    )
    if not args.shape:
        return Engine.from_config(config, RichProgress())
    mesh = make_mesh(config.tp)
    spec = parse_config(SHAPES[args.shape], args.shape)
    model = init_random(spec, mesh, resolve_dtype(config.dtype, mesh))
    runner = Runner(config, model, spec, f"{args.shape} (random weights)", mesh, RichProgress())
    return Engine(config, runner.info, runner)


def _measure_all(
    engine: Engine, executor: LastPlan, args: argparse.Namespace, bandwidth: float
) -> tuple[list[Measured], dict[str, str]]:
    """Each batch size in turn; stopped from outside, what has been measured so far."""
    found: list[Measured] = []
    try:
        with stoppable():
            for batch in args.batch:
                found.append(_measure(engine, executor, batch, args, bandwidth))
    except KeyboardInterrupt:
        return found, {f"batch {batch}": "stopped before it was measured" for batch in args.batch[len(found) :]}
    return found, {}


def _measure(engine: Engine, executor: LastPlan, batch: int, args: argparse.Namespace, bandwidth: float) -> Measured:
    """Step time once all rows decode."""
    rng, context, steps = random.Random(args.seed), args.context, args.steps
    names = [f"{batch}-{i}" for i in range(batch)]
    for name in names:
        prompt = [rng.randrange(engine.info.vocab_size) for _ in range(context)]
        engine.add(EngineRequest(request_id=name, token_ids=prompt, sampling=SamplingParams()))
    times_s: list[float] = []
    while len(times_s) <= steps:
        start_s = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == batch:  # every row got a token: a whole decode step
            times_s.append(time.perf_counter() - start_s)
        elif any(output.finish_reason for output in outputs):
            raise ConfigError(f"{batch} rows never decode together: use a smaller --batch or --context")
    device_s = _device_seconds(executor)
    for name in names:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    token_bytes = engine.info.pool_bytes / engine.info.device_blocks / engine.info.block_size
    return Measured(
        batch=batch,
        step_s=median(times_s[1:]),
        least_s=(engine.info.weight_bytes + token_bytes * (context + steps / 2) * batch) / bandwidth,
        device_s=device_s,
        host_s=median(r.host_s for r in engine.step_records() if r.num_tokens == batch),
    )


def _device_seconds(executor: LastPlan) -> float:
    """Of the last step, sent again and again: it writes the same KV to the same slots each time."""
    executor.launch(executor.plan).read()
    start_s = time.perf_counter()
    launched = [executor.launch(executor.plan) for _ in range(BACK_TO_BACK)]
    launched[-1].read()
    return (time.perf_counter() - start_s) / BACK_TO_BACK


if __name__ == "__main__":
    sys.exit(main())
