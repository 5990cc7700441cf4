"""The simulated world behind the three doors: the production scheduler and cache run in it without a device.

`SimulatedExecutor` keeps a paged KV memory of its own, in which each position holds a hash of the whole prefix that
was written up to it. The token that it samples is a function of what it *reads* through the block table, so that a
wrong, stale or shared-too-early block gives a wrong token, just as on a device, and is seen by comparing outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jserve.doors import Completion, StepResult
from jserve.sched.plan import StepPlan

_MASK = (1 << 64) - 1


class SimulatedClock:
    """Time that moves only when it is told to."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now(self) -> float:
        return self._now_s

    def advance_to(self, time_s: float) -> None:
        self._now_s = max(self._now_s, time_s)


def hash_prefix(previous: int, token: int) -> int:
    """The simulated KV of a position: depends on the KV before it and on the token there."""
    return ((previous ^ (token + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _MASK


def next_token(kv: int, vocab_size: int) -> int:
    """What the simulated model samples after a prefix."""
    return (kv >> 17) % vocab_size


def expected_tokens(prompt: list[int], count: int, vocab_size: int) -> list[int]:
    """What any correct engine over this model says after `prompt`."""
    kv, out = 0, []
    for token in prompt:
        kv = hash_prefix(kv, token)
    for _ in range(count):
        out.append(next_token(kv, vocab_size))
        kv = hash_prefix(kv, out[-1])
    return out


@dataclass(slots=True)
class SimulatedStep:
    clock: SimulatedClock
    end_s: float
    tokens: list[int]
    pack_s: float = 0.0

    def read(self) -> StepResult:
        self.clock.advance_to(self.end_s)
        return StepResult(self.tokens)


class SimulatedExecutor:
    """Runs plans at launch, in launch order, as a device would; `step_s` says how long a plan takes."""

    def __init__(
        self,
        clock: SimulatedClock,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        step_s: Callable[[StepPlan], float] = lambda plan: 0.01,
    ) -> None:
        self.clock = clock
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.kv = [[0] * block_size for _ in range(num_blocks)]
        self._step_s = step_s
        self._busy_until_s = 0.0
        self._last_token: dict[int, int] = {}

    compiles_after_warmup = 0

    def close(self) -> None:
        self.kv = []

    def launch(self, plan: StepPlan) -> SimulatedStep:
        tokens = []
        for row in plan.rows:  # every row writes before any reads, as in a layer of the real model
            sequence = row.sequence
            for position in range(row.start, row.start + row.count):
                known = position < len(sequence.tokens)
                token = sequence.tokens[position] if known else self._last_token[sequence.slot]
                before = self._read(sequence.table.blocks, position - 1) if position else 0
                self._write(sequence.table.blocks, position, hash_prefix(before, token))
        for row in plan.rows:
            if row.samples:
                kv = self._read(row.sequence.table.blocks, row.start + row.count - 1)
                tokens.append(next_token(kv, self.vocab_size))
                self._last_token[row.sequence.slot] = tokens[-1]
        self._busy_until_s = max(self._busy_until_s, self.clock.now()) + self._step_s(plan)
        return SimulatedStep(self.clock, self._busy_until_s, tokens)

    def _read(self, blocks: list[int], position: int) -> int:
        return self.kv[blocks[position // self.block_size]][position % self.block_size]

    def _write(self, blocks: list[int], position: int, value: int) -> None:
        self.kv[blocks[position // self.block_size]][position % self.block_size] = value


class SimulatedTransfer:
    """Copies between a `SimulatedExecutor`'s KV memory and a host memory of the same kind, `copy_s` later."""

    def __init__(
        self, clock: SimulatedClock, executor: SimulatedExecutor, host_slots: int, copy_s: Callable[[int], float]
    ) -> None:
        self.clock = clock
        self.host = [[0] * executor.block_size for _ in range(host_slots)]
        self._executor = executor
        self._copy_s = copy_s
        self._pending: list[tuple[float, int, list[tuple[int, list[int]]]]] = []

    def store(self, ticket: int, blocks: list[int], host_slots: list[int]) -> None:
        for block, slot in zip(blocks, host_slots, strict=True):
            self.host[slot] = list(self._executor.kv[block])
        self._pending.append((self.clock.now() + self._copy_s(len(blocks)), ticket, []))

    def load(self, ticket: int, host_slots: list[int], blocks: list[int]) -> None:
        copies = [(block, list(self.host[slot])) for slot, block in zip(host_slots, blocks, strict=True)]
        self._pending.append((self.clock.now() + self._copy_s(len(blocks)), ticket, copies))

    def poll(self) -> list[Completion]:
        now = self.clock.now()
        ended = [copy for copy in self._pending if copy[0] <= now]
        self._pending = [copy for copy in self._pending if copy[0] > now]
        for _, _, copies in ended:
            for block, contents in copies:
                self._executor.kv[block] = contents
        return [Completion(ticket) for _, ticket, _ in ended]
