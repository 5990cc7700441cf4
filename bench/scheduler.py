"""What the scheduler costs a step, however many requests wait: the production scheduler and cache, driven alone.

    python -m bench.scheduler [--running 256] [--waiting 1000,10000,100000] [--json] [--save [LABEL]]

A step is one `schedule()` and one `commit()` of the step before it, as the engine overlaps them; the tokens come from
nowhere, and nothing is computed. Prefix caching is on: every block that fills is hashed and published.

- step: `--running` decodes, each slot taken. In every step another request arrives, so that the queue is looked at.
- churn: answers are short and the pool is small, so that requests end, start, are promoted and preempted all the time.

Times are processor time of this one process, medians over the steps; `others_cores` is what other processes took
meanwhile. For comparison: vLLM 0.32's scheduler, driven alone on a machine of this kind, took 3,180 us at 256 running
with prefix caching, whatever waited.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from statistics import median, quantiles

from bench import report
from bench.noise import Noise
from jserve.cache.block_keys import root_key
from jserve.cache.kv_cache import BlockTable, KVCache
from jserve.request import SamplingParams
from jserve.sched.plan import StepPlan
from jserve.sched.scheduler import Scheduler
from jserve.sched.sequence import Sequence

BLOCK_SIZE = 16
VOCAB = 32_000
PROMPT_TOKENS = (16, 256)
BUDGET = 2048


@dataclass(frozen=True)
class Measured:
    """One scenario at one length of the queue."""

    scenario: str
    asked: int
    """Waiting, as asked for; the pool of `churn` takes some of them first."""
    running: float
    """In the mean."""
    waiting: int
    step_us: float
    p99_us: float
    promotions: int
    preemptions: int


class Driver:
    """A scheduler without an engine: it steps, and takes the time."""

    def __init__(self, running: int, blocks: int, seed: int) -> None:
        self.scheduler = Scheduler(KVCache(blocks, BLOCK_SIZE), max_running=running, token_budget=BUDGET)
        self._rng = random.Random(seed)
        self._root = root_key("bench")
        self._launched: StepPlan | None = None
        self._made = 0

    def add(self, prompt: tuple[int, int], answer: tuple[int, int]) -> None:
        rng, length = self._rng, self._rng.randint(*prompt)
        self._made += 1
        self.scheduler.add(
            Sequence(
                request_id=str(self._made),
                tokens=[rng.randrange(VOCAB) for _ in range(length)],
                sampling=SamplingParams(),
                stop_token_ids=frozenset({VOCAB}),
                table=BlockTable(self._root),
                max_tokens_total=length + rng.randint(*answer),
                num_prompt=length,
            )
        )

    def step(self) -> float:
        """Returns what it took, in seconds of processor time."""
        tokens = self._tokens()
        start_s = time.process_time()
        plan = self.scheduler.schedule()
        if self._launched is not None:
            self.scheduler.commit(self._launched, tokens)
        taken_s = time.process_time() - start_s
        self._launched = plan
        self.scheduler.events.take()
        return taken_s

    def _tokens(self) -> list[int]:
        if self._launched is None:
            return []
        return [self._rng.randrange(VOCAB) for row in self._launched.rows if row.samples]


def measure_steps(running: int, waiting: int, steps: int, seed: int) -> Measured:
    """All slots are taken by decodes; a request arrives in every step."""
    driver = Driver(running, blocks=running * (PROMPT_TOKENS[1] + 3 * steps) // BLOCK_SIZE, seed=seed)
    for _ in range(running):
        driver.add(PROMPT_TOKENS, (10 * steps, 10 * steps))
    while driver.scheduler.num_waiting or driver.scheduler.stats.decode_tokens < running:
        driver.step()
    for _ in range(waiting):
        driver.add(PROMPT_TOKENS, (64, 64))
    return _measured("step", waiting, driver, steps, lambda: driver.add(PROMPT_TOKENS, (64, 64)))


def measure_churn(running: int, waiting: int, steps: int, seed: int) -> Measured:
    """The pool holds about `running` requests of many lengths; as many arrive as end."""
    prompt, answer = (16, 1024), (16, 256)
    mean_blocks = (sum(prompt) + sum(answer)) // 2 // BLOCK_SIZE + 1
    driver = Driver(2 * running, blocks=running * mean_blocks, seed=seed)
    for _ in range(running + waiting):
        driver.add(prompt, answer)
    for _ in range(max(answer)):
        driver.step()

    def refill() -> None:
        while driver.scheduler.num_waiting < waiting:
            driver.add(prompt, answer)

    return _measured("churn", waiting, driver, steps, refill)


def _measured(scenario: str, asked: int, driver: Driver, steps: int, arrive: Callable[[], None]) -> Measured:
    scheduler = driver.scheduler
    waiting, before = scheduler.num_waiting, (scheduler.stats.promotions, scheduler.stats.preemptions)
    taken, running = [], 0
    for _ in range(steps):
        arrive()
        taken.append(driver.step())
        running += scheduler.num_running
    return Measured(
        scenario,
        asked,
        running / steps,
        waiting,
        1e6 * median(taken),
        1e6 * quantiles(taken, n=100)[-1],
        scheduler.stats.promotions - before[0],
        scheduler.stats.preemptions - before[1],
    )


def main(argv: Seq[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    console = report.console(args)
    noise = Noise(None)
    found = []
    for waiting in args.waiting:
        for measure in (measure_steps, measure_churn):
            report.note(console, f"{measure.__name__.partition('_')[2]}, {waiting} waiting ...")
            found.append(measure(args.running, waiting, args.steps, args.seed))
    columns = ("scenario", "running", "waiting", "step p50 us", "p99 us", "promoted", "preempted")
    rows = [(m.scenario, m.running, m.waiting, m.step_us, m.p99_us, m.promotions, m.preemptions) for m in found]
    console.print(report.table("schedule() + commit()", columns, rows))
    metrics = {f"{m.scenario}_us_{args.running}_{m.asked}": m.step_us for m in found}
    metrics |= {f"{m.scenario}_p99_us_{args.running}_{m.asked}": m.p99_us for m in found}
    settings = {"running": args.running, "waiting": args.waiting, "steps": args.steps, "block_size": BLOCK_SIZE}
    metrics["others_cores"] = noise.others_cores()
    report.note(console, f"other processes took {metrics['others_cores']:.2f} cores meanwhile")
    report.emit(report.Result("scheduler", metrics, settings, args.seed), args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scheduler", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, default=256, help="decodes in every step (default 256)")
    parser.add_argument("--waiting", type=_numbers, default="1000,10000,100000", help="lengths of the queue")
    parser.add_argument("--steps", type=int, default=300, help="steps to take the median of (default 300)")
    report.add_arguments(parser)
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
