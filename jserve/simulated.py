"""The simulated world behind the three doors: the production scheduler and cache run in it without a device.

`SimulatedExecutor` keeps a paged KV memory of its own, in which each position holds a hash of the whole prefix that
was written up to it. The token that it samples is a function of all that it *reads* through the block table, so that a
wrong, stale or shared-too-early block gives a wrong token, just as on a device, and is seen by comparing outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from jserve.cache.transfer import Completion
from jserve.doors import StepResult
from jserve.sched.plan import Row, StepPlan

_MASK = (1 << 64) - 1
_NO_PHASE = nullcontext()


class SimulatedClock:
    """Time that moves only when it is told to."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now(self) -> float:
        return self._now_s

    def advance_to(self, time_s: float) -> None:
        self._now_s = max(self._now_s, time_s)

    def wait(self, seconds: float) -> None:
        self._now_s += seconds


def hash_prefix(previous: int, token: int) -> int:
    """The simulated KV of a position: depends on the KV before it and on the token there."""
    return ((previous ^ (token + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _MASK


def next_token(attended: int, vocab_size: int) -> int:
    """What the simulated model samples: a function of the sum of the KV of every position before."""
    return ((attended & _MASK) >> 17) % vocab_size


def expected_tokens(prompt: list[int], count: int, vocab_size: int) -> list[int]:
    """What any correct engine over this model says after `prompt`."""
    kv, attended, out = 0, 0, []
    for token in prompt:
        kv = hash_prefix(kv, token)
        attended += kv
    for _ in range(count):
        out.append(next_token(attended, vocab_size))
        kv = hash_prefix(kv, out[-1])
        attended += kv
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
    """Runs plans at launch, in launch order, as a device would; `step_s` says how long all steps of a plan take."""

    def __init__(
        self,
        clock: SimulatedClock,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        step_s: Callable[[StepPlan], float] = lambda plan: 0.01 * plan.steps,
    ) -> None:
        self.clock = clock
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.kv = [[0] * block_size for _ in range(num_blocks)]
        self._step_s = step_s
        self._busy_until_s = 0.0
        self._last_token: dict[int, int] = {}

    compiles_after_warmup = 0

    def phase(self, name: str) -> AbstractContextManager[object]:
        return _NO_PHASE

    def close(self) -> None:
        self.kv = []

    def launch(self, plan: StepPlan) -> SimulatedStep:
        assert all(sequence.slot >= 0 for sequence in plan.admitted), "it would take another's place in the batch"
        sampled: list[list[int]] = [[] for row in plan.rows if row.samples]
        for step in range(plan.steps):
            self._run(plan.rows, step, sampled)
        self._busy_until_s = max(self._busy_until_s, self.clock.now()) + self._step_s(plan)
        return SimulatedStep(self.clock, self._busy_until_s, [token for tokens in sampled for token in tokens])

    def _run(self, rows: list[Row], step: int, sampled: list[list[int]]) -> None:
        """The plan's step of this number; appends to each sampling row's tokens."""
        for row in rows:  # every row writes before any reads, as in a layer of the real model
            sequence = row.sequence
            for position in range(row.start + step, row.start + step + row.count):
                known = position < len(sequence.tokens)
                token = sequence.tokens[position] if known else self._last_token[sequence.slot]
                before = self._read(sequence.table.blocks, position - 1) if position else 0
                self._write(sequence.table.blocks, position, hash_prefix(before, token))
        for row, tokens in zip((row for row in rows if row.samples), sampled, strict=True):
            attended = self._attend(row.sequence.table.blocks, row.start + step + row.count)
            tokens.append(next_token(attended, self.vocab_size))
            self._last_token[row.sequence.slot] = tokens[-1]

    def _read(self, blocks: list[int], position: int) -> int:
        return self.kv[blocks[position // self.block_size]][position % self.block_size]

    def _attend(self, blocks: list[int], num_tokens: int) -> int:
        whole, rest = divmod(num_tokens, self.block_size)
        return sum(sum(self.kv[block]) for block in blocks[:whole]) + sum(self.kv[blocks[whole]][:rest] if rest else ())

    def _write(self, blocks: list[int], position: int, value: int) -> None:
        self.kv[blocks[position // self.block_size]][position % self.block_size] = value


@dataclass(slots=True)
class _Copy:
    end_s: float
    ticket: int
    apply: Callable[[], str | None]
    """Makes it so, when it ends; tells what went wrong."""


class SimulatedTransfer:
    """Copies between a `SimulatedExecutor`'s KV memory, a host memory and a disk of the same kind.

    `copy_s(kind, blocks)` says how long a copy takes, kind being store, load, read or write; `fails(kind)` whether this
    one comes to nothing, as a fault of the disk where one takes part. `orders_loads`: loads and steps go through one
    queue. `disk` may be handed on to a later process.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        executor: SimulatedExecutor,
        host_slots: int,
        copy_s: Callable[[str, int], float],
        *,
        disk: dict[bytes, list[int]] | None = None,
        fails: Callable[[str], bool] = lambda kind: False,
        orders_loads: bool = False,
        in_turn: bool = False,
    ) -> None:
        self.clock = clock
        self.in_turn = in_turn
        self.orders_loads = orders_loads
        self.host = [[0] * executor.block_size for _ in range(host_slots)]
        self.disk: dict[bytes, list[int]] = {} if disk is None else disk
        self._executor, self._copy_s, self._fails = executor, copy_s, fails
        self._pending: list[_Copy] = []

    def store(self, ticket: int, blocks: list[int], host_slots: list[int]) -> None:
        taken = [list(self._executor.kv[block]) for block in blocks]  # steps may overwrite the blocks from now on

        def apply() -> str | None:
            for slot, contents in zip(host_slots, taken, strict=True):
                self.host[slot] = contents
            return None

        self._start("store", ticket, len(blocks), apply)

    def load(self, ticket: int, host_slots: list[int], blocks: list[int]) -> bool:
        def apply() -> str | None:
            for slot, block in zip(host_slots, blocks, strict=True):
                self._executor.kv[block] = list(self.host[slot])
            return None

        if self.orders_loads:
            apply()  # before any step to come, and only its end is told later
        self._start("load", ticket, len(blocks), (lambda: None) if self.orders_loads else apply)
        return self.orders_loads

    def write(self, ticket: int, host_slot: int, key: bytes) -> None:
        def apply() -> str | None:
            self.disk[key] = list(self.host[host_slot])
            return None

        self._start("write", ticket, 1, apply)

    def read(self, ticket: int, key: bytes, host_slot: int) -> None:
        def apply() -> str | None:
            if key not in self.disk:
                return "missing"
            self.host[host_slot] = list(self.disk[key])
            return None

        self._start("read", ticket, 1, apply)

    def delete(self, key: bytes) -> None:
        self.disk.pop(key, None)

    def cancel(self, ticket: int) -> None:
        self._pending = [copy for copy in self._pending if copy.ticket != ticket]

    def poll(self) -> list[Completion]:
        now = self.clock.now()
        ended = [copy for copy in self._pending if copy.end_s <= now]
        self._pending = [copy for copy in self._pending if copy.end_s > now]
        completions = []
        for copy in ended:
            error = copy.apply()
            completions.append(Completion(copy.ticket, error, device_fault=error == _FAULT))
        return completions

    def close(self) -> None:
        self._pending = []

    def _start(self, kind: str, ticket: int, blocks: int, apply: Callable[[], str | None]) -> None:
        if self._fails(kind) and not (kind == "load" and self.orders_loads):
            apply = lambda: _FAULT  # noqa: E731
        self._pending.append(_Copy(self.clock.now() + self._copy_s(kind, blocks), ticket, apply))


_FAULT = "the simulated copy has failed"
