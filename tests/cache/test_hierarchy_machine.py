"""Whatever requests, aborts, faults and delays come in whatever order: no token is wrong, and nothing stays held.

A hypothesis state machine over the production engine, scheduler and hierarchy. Copies behind the simulated Transfer
door are delayed and so reordered, fail, never end, and are told of late or twice; files vanish; memory runs short.
"""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiers_world import BLOCK, VOCAB, World, with_gaps

from jserve.cache.returns import GapModel
from jserve.cache.transfer import Completion
from jserve.config import SchedConfig
from jserve.simulated import expected_tokens

NEVER = 1e9
KINDS = ("store", "load", "read", "write")
CHATS, FIRST, LONGEST = 7, 18, 44
"""Conversations, tokens of a first prompt, and of the longest with its answer: 11 blocks."""


class Guesses(GapModel):
    """Predictions at random, so that much is read ahead, and much of it for nothing."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    def gap_s(self, answer_tokens: int) -> float:
        return self.rng.choice([0.0, 0.05, 5.0, 100.0]) * self.rng.random()


class Hierarchy(RuleBasedStateMachine):
    @initialize(
        sizes=st.tuples(
            st.integers(12, 18), st.sampled_from([14, 20, 7, 40, 1]), st.sampled_from([200, 200, 30, None, 1])
        ),
        strategy=st.sampled_from(["always", "gaps", "gaps", "cost", "flashgen"]),
        eviction=st.sampled_from(["lru", "fifo", "lookahead", "returns", "returns"]),
        ahead=st.sampled_from([0.0, 1e-6, 1e-4, 1e-4]),
        staging=st.sampled_from([100, 4, 0]),
        budget=st.sampled_from([1, 16]),
        switches=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        order=st.sampled_from(["fcfs", "flashgen"]),
        preempt=st.sampled_from(["recompute", "swap", "auto"]),
        running=st.integers(1, 4),
        seed=st.integers(0, 99),
    )
    def start(self, sizes, strategy, eviction, ahead, staging, budget, switches, order, preempt, running, seed) -> None:  # type: ignore[no-untyped-def]
        device, host, disk_blocks = sizes
        orders_loads, device_reuse, self.repeats = switches
        self.random = random.Random(seed)
        self.delay_s = {kind: self.random.choice([0.0, 0.003, 0.03, 0.15]) for kind in KINDS}
        self.broken: set[str] = set()
        self.prompts: dict[str, list[int]] = {}
        self.chats = [[self.random.randrange(VOCAB) for _ in range(FIRST)] for _ in range(CHATS)]
        self.world = World(
            device=device,
            host=host,
            disk_blocks=disk_blocks,
            copy_s=lambda kind, blocks: self.delay_s[kind] * self.random.random(),
            fails=lambda kind: kind in self.broken,
            strategy=with_gaps(self.random, 0.7) if strategy == "gaps" else strategy,
            eviction=eviction,
            staging=staging,
            wait_limit_s=0.1,
            store_budget=budget,
            device_reuse=device_reuse,
            orders_loads=orders_loads,
            read_ahead_s=ahead,
            sched=SchedConfig(max_running=running, token_budget=16, order=order, preempt=preempt),
        )
        if ahead:
            self.world.cache.tiers.returns.model = Guesses(self.random)
            self.world.cache.ahead.margin, self.world.cache.ahead.margin_errors = 1.0, 0.0
        self.told: list[Completion] = []
        self.poll = self.world.transfer.poll
        self.world.transfer.poll = self.repeated  # type: ignore[method-assign]

    def repeated(self) -> list[Completion]:
        ended = self.poll()
        self.told += ended
        again = [self.random.choice(self.told)] if self.repeats and self.told else []
        return ended + again

    @rule(chat=st.integers(0, CHATS - 1), tokens=st.integers(1, 8))
    def ask(self, chat: int, tokens: int) -> None:
        """The next turn of a conversation, or its first again if it has become too long."""
        prompt = self.chats[chat]
        if len(prompt) + tokens > LONGEST:
            prompt = prompt[:FIRST]
        name = str(len(self.prompts))
        self.prompts[name] = prompt
        self.world.add(name, prompt, tokens)
        answer = expected_tokens(prompt, tokens, VOCAB)
        self.chats[chat] = prompt + answer + [self.random.randrange(VOCAB) for _ in range(3)]

    @rule(tokens=st.integers(1, 8), steps=st.integers(0, 3))
    def ask_all(self, tokens: int, steps: int) -> None:
        for chat in self.random.sample(range(CHATS), CHATS):
            self.ask(chat, tokens)
            self.step(steps)

    @rule(count=st.sampled_from([1, 3, 10, 60]))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.world.engine.has_work:
                self.world.step()

    @rule()
    def become_idle(self) -> None:
        self.world.run()
        self.world.check_nothing_is_held()

    @precondition(lambda self: self.prompts)
    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        self.world.engine.abort(str(which % len(self.prompts)))

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.2, 5.0, 100.0]))
    def sleep(self, seconds: float) -> None:
        for _ in range(5):
            self.world.clock.wait(seconds / 5)
            self.world.cache.poll(self.world.clock.now())

    @rule(kind=st.sampled_from(KINDS), delay_s=st.sampled_from([0.0, 0.01, 0.15]))
    def delay(self, kind: str, delay_s: float) -> None:
        self.delay_s[kind] = delay_s

    @rule(kinds=st.sets(st.sampled_from(KINDS), min_size=1))
    def hang(self, kinds: set[str]) -> None:
        for kind in kinds:  # what has its turn among the steps ends when they do
            self.delay_s[kind] = 0.15 if kind == "load" and self.world.transfer.orders_loads else NEVER

    @rule(kinds=st.sets(st.sampled_from(KINDS)))
    def fail(self, kinds: set[str]) -> None:
        self.broken = kinds

    @precondition(lambda self: self.world.transfer.disk)
    @rule(which=st.integers(0, 99))
    def delete_a_file(self, which: int) -> None:
        disk = self.world.transfer.disk
        del disk[sorted(disk)[which % len(disk)]]

    @invariant()
    def what_is_said_is_right(self) -> None:
        for name, prompt in getattr(self, "prompts", {}).items():
            said = self.world.said[name]
            assert said == expected_tokens(prompt, len(said), VOCAB), name

    @invariant()
    def no_tier_holds_more_than_it_may(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.check_books()
        cache = self.world.cache
        assert len(cache.host) <= cache.host.num_slots
        assert 0 <= cache.staging.taken <= cache.staging.blocks + cache.host.num_slots
        assert all(0 <= restore.reading <= restore.staging for restore in cache.tiers.restores)
        assert all(restore.settled <= restore.split for restore in cache.tiers.restores)
        if cache.disk is not None:
            assert len(cache.disk) <= cache.disk.num_blocks

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.run()
        self.what_is_said_is_right()
        self.world.check_nothing_is_held()
        assert self.world.engine.stats().held_blocks == 0
        self.broken.clear()
        self.delay_s = dict.fromkeys(KINDS, 0.0)
        self.world.clock.wait(100.0)
        prompt = [1] * (3 * BLOCK)
        for name in ("after all", "after all that"):  # it recovers
            self.prompts[name] = prompt
            self.world.ask(name, prompt)
        self.world.engine.close()
        self.world.check_nothing_is_held()


TestHierarchy = Hierarchy.TestCase
TestHierarchy.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
