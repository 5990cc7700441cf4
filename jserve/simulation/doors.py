"""The timed world behind the engine's doors: steps and copies take the time that a cost model says, and do nothing.

Nothing is computed and nothing is copied, so that a simulated second costs little; `jserve.simulated` has the doors
that check contents. The engine, the scheduler and the cache in front of them are the production ones.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from jserve.cache.cost import CostModel, LinkCost
from jserve.cache.transfer import LOAD_AT_ONCE_BYTES, Completion
from jserve.sched.plan import StepPlan
from jserve.sched.sequence import Sequence as Running
from jserve.simulated import SimulatedClock, SimulatedStep

_OUTPUT = 1 << 30
"""Sampled tokens are above all contents, and of one value for each request: no two answers are the same text."""
VOCAB_SIZE = 1 << 30
"""Contents of prompts stay below it; the engine is told twice as much."""


_NO_PHASE = nullcontext()


class TimedClock(SimulatedClock):
    """Simulated time. To wait is to go on to the next thing that happens: there is no other."""

    def __init__(self) -> None:
        super().__init__()
        self.alarms: list[Callable[[], float]] = []
        """Each tells when its next thing happens; infinite for never."""

    def wait(self, seconds: float) -> None:
        """Until the next alarm, however far; so many seconds if there is none."""
        following = min((alarm() for alarm in self.alarms), default=math.inf)
        self._now_s = max(self._now_s, following) if following < math.inf else self._now_s + seconds


@dataclass(frozen=True)
class Spread:
    """How single steps of a real engine differ from what such steps take in the mean: measured over fitted.

    A machine whose steps vary has longer queues than one of the same mean whose steps do not.
    """

    decode: tuple[float, ...]
    mixed: tuple[float, ...]
    """Of steps with chunks of prompts."""
    seed: int = 0


@dataclass(slots=True)
class StepTime:
    """What a step takes, from the numbers of a cost model; with a spread, times a ratio that is drawn from it.

    Decodes alone take their model's time, or that of the linear layers' arithmetic if it is more. In a batch with
    prefill chunks all tokens go through the linear layers together: reading the weights hides behind the arithmetic or
    the other way round, and attention comes on top of that (limits, 6.2 and 6.3; chunked prefill, Sarathi-Serve).
    """

    cost: CostModel
    spread: Spread | None = None
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.spread.seed if self.spread is not None else 0)

    def seconds(self, plan: StepPlan) -> float:
        if self.spread is None:
            return self._mean_s(plan)
        ratios = self.spread.decode if plan.num_decodes == len(plan.rows) else self.spread.mixed
        return self._mean_s(plan) * self._rng.choice(ratios)

    def _mean_s(self, plan: StepPlan) -> float:
        decode, prefill = self.cost.decode, self.cost.prefill
        decodes, rows = plan.num_decodes, plan.rows
        context = sum(row.start for row in rows[:decodes]) + decodes if decodes else 0
        if decodes == len(rows):
            return self.decode_s(decodes, context, plan.steps)
        tokens = sum(row.count for row in rows)
        pairs = sum(row.count * (row.start + row.count / 2) for row in rows[decodes:])
        linear_s = max(decode.overhead_s, prefill.overhead_s + prefill.per_token_s * tokens)
        return linear_s + prefill.per_pair_s * pairs + decode.per_context_token_s * context

    def decode_s(self, sequences: int, context: int, steps: int = 1) -> float:
        """`steps` decode steps in a row, from `context` tokens of all sequences together on."""
        decode = self.cost.decode
        floor_s = self.cost.prefill.per_token_s * sequences
        first_s = decode.seconds(sequences, context)
        if first_s >= floor_s:
            return steps * first_s + decode.per_context_token_s * sequences * steps * (steps - 1) / 2
        return sum(max(floor_s, decode.seconds(sequences, context + sequences * i)) for i in range(steps))


class TimedExecutor:
    """Takes as long as the cost model says, and samples tokens that mean nothing."""

    compiles_after_warmup = 0

    def __init__(self, clock: TimedClock, step_time: StepTime, host_s: float = 0.0) -> None:
        """`host_s`: what the engine's own Python takes a step, where it is not hidden."""
        self._clock, self._step_time, self._host_s = clock, step_time, host_s
        self._busy_until_s = 0.0
        self.last_s = 0.0
        """What the newest plan takes."""
        self.busy_s = 0.0
        """What all plans have taken."""
        self.on_launch: Callable[[StepPlan, float], None] = lambda plan, seconds: None

    def launch(self, plan: StepPlan) -> SimulatedStep:
        seconds = self._step_time.seconds(plan) + self._host_s * plan.steps
        self.last_s = seconds
        self.busy_s += seconds
        self._busy_until_s = max(self._busy_until_s, self._clock.now()) + seconds
        tokens: list[int] = []
        steps = plan.steps
        for row in plan.rows:
            if row.samples:
                tokens += [_OUTPUT + row.sequence.rank[1]] * steps
        self.on_launch(plan, seconds)
        return SimulatedStep(self._clock, self._busy_until_s, tokens)

    def take(self, seconds: float) -> float:
        """Something else has its turn after all steps that were launched; when it ends."""
        self._busy_until_s = max(self._busy_until_s, self._clock.now()) + seconds
        return self._busy_until_s

    def phase(self, name: str) -> AbstractContextManager[object]:
        return _NO_PHASE

    def steps_until(self, running: Sequence[Running], due_s: float, most: int) -> int:
        """Decode steps of these until one of them ends after `due_s`: whoever comes then waits for no other."""
        if due_s == math.inf:
            return most
        left_s = due_s - self._clock.now()
        count = len(running)
        if left_s <= 0 or not count:
            return 1
        context = sum(sequence.num_computed for sequence in running)
        first_s = self._step_time.decode_s(count, context + count) + self._host_s
        steps = min(most, math.ceil(left_s / first_s))
        # Later steps take longer, so that fewer may do.
        while steps > 1 and self._step_time.decode_s(count, context + count, steps - 1) >= left_s:
            steps -= 1
        return max(1, steps)

    def close(self) -> None:
        """There is nothing to give back."""


@dataclass(slots=True)
class _Link:
    """Copies in one direction, one after the other."""

    cost: LinkCost
    free_s: float = 0.0

    def start(self, now_s: float, num_bytes: float, copies: float) -> tuple[float, float]:
        """When a copy that is asked for now ends, and what it takes once its turn has come."""
        seconds = self.cost.seconds(num_bytes, copies)
        self.free_s = max(self.free_s, now_s) + seconds
        return self.free_s, seconds


_Copy = tuple[float, int, float, int]
"""When it ends, its ticket, what it takes in seconds, and its bytes."""


class TimedTransfer:
    """Copies that take their time: a queue each way on the link, and one each for reading and writing on disk.

    They leave the device's time to the steps; `InTurnTransfer` has those that do not.
    """

    in_turn = False

    def __init__(self, clock: TimedClock, cost: CostModel) -> None:
        self._clock, self._block_bytes, self._blocks_per_copy = clock, cost.block_bytes, cost.blocks_per_copy
        self._out, self._in = _Link(cost.device_to_host), _Link(cost.host_to_device)
        self._reading, self._writing = _Link(cost.disk_read), _Link(cost.disk_write)
        self._copies: list[_Copy] = []
        self._reads: deque[float] = deque()
        self._cancelled: set[int] = set()
        clock.alarms.append(self._next_s)

    def store(self, ticket: int, blocks: list[int], host_slots: list[int]) -> None:
        self._start(self._out, ticket, len(blocks), len(blocks) / self._blocks_per_copy)

    def load(self, ticket: int, host_slots: list[int], blocks: list[int]) -> bool:
        self._start(self._in, ticket, len(blocks), len(blocks) / self._blocks_per_copy)
        return False

    def write(self, ticket: int, host_slot: int, key: bytes) -> None:
        self._start(self._writing, ticket, 1, 1)

    def read(self, ticket: int, key: bytes, host_slot: int) -> None:
        self._start(self._reading, ticket, 1, 1)
        self._reads.append(self._reading.free_s)

    def delete(self, key: bytes) -> None:
        """Takes no time."""

    def cancel(self, ticket: int) -> None:
        self._cancelled.add(ticket)

    def poll(self) -> list[Completion]:
        now_s, ended = self._clock.now(), []
        while self._reads and self._reads[0] <= now_s:
            self._reads.popleft()
        while self._copies and self._copies[0][0] <= now_s:
            _, ticket, seconds, num_bytes = heapq.heappop(self._copies)
            if ticket in self._cancelled:
                self._cancelled.remove(ticket)
            else:
                ended.append(Completion(ticket, seconds=seconds, num_bytes=num_bytes))
        return ended

    @property
    def next_read_s(self) -> float:
        """When a read that is under way ends, the first; infinite if none is."""
        return self._reads[0] if self._reads else math.inf

    def close(self) -> None:
        self._copies.clear()

    def _start(self, link: _Link, ticket: int, blocks: int, copies: float) -> None:
        now_s, num_bytes = self._clock.now(), blocks * self._block_bytes
        end_s, seconds = link.start(now_s, num_bytes, copies)
        heapq.heappush(self._copies, (end_s, ticket, seconds, num_bytes))

    def _next_s(self) -> float:
        return self._copies[0][0] if self._copies else math.inf


class InTurnTransfer(TimedTransfer):
    """Copies between device and host that have their turn among the steps, in the device's one queue, as on a CPU
    (`jserve.host_slots.SharedSlots`): what is loaded in one part may be read by every step launched from then on."""

    in_turn = True

    def __init__(self, clock: TimedClock, cost: CostModel, executor: TimedExecutor) -> None:
        super().__init__(clock, cost)
        self._executor = executor
        self._at_once = max(1, LOAD_AT_ONCE_BYTES // cost.block_bytes)
        self._loads: deque[tuple[int, list[int]]] = deque()
        """By ticket, the blocks of each part that is not started."""

    def store(self, ticket: int, blocks: list[int], host_slots: list[int]) -> None:
        self._take(self._out.cost, ticket, len(blocks))

    def load(self, ticket: int, host_slots: list[int], blocks: list[int]) -> bool:
        waits = bool(self._loads)
        parts = [min(self._at_once, len(blocks) - start) for start in range(0, len(blocks), self._at_once)]
        self._loads.append((ticket, parts))
        if not waits:
            self._load_part()
        return not self._loads

    def _load_part(self) -> None:
        ticket, parts = self._loads[0]
        blocks = parts.pop(0)
        self._take(self._in.cost, 0 if parts else ticket, blocks)
        if not parts:
            self._loads.popleft()

    def _take(self, link: LinkCost, ticket: int, blocks: int) -> None:
        num_bytes = blocks * self._block_bytes
        seconds = link.seconds(num_bytes, blocks / self._blocks_per_copy)
        heapq.heappush(self._copies, (self._executor.take(seconds), ticket, seconds, num_bytes))

    def cancel(self, ticket: int) -> None:
        left = [load for load in self._loads if load[0] != ticket]
        if len(left) == len(self._loads):
            super().cancel(ticket)
        self._loads = deque(left)

    def poll(self) -> list[Completion]:
        if self._loads:
            self._load_part()
        return [end for end in super().poll() if end.ticket]
