"""An engine over three simulated tiers, for the tests of the hierarchy.

The simulated executor's tokens are a function of the KV that it reads, so a block that is wrong, stale or not there yet
shows as a wrong token.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from jserve.cache.cost import (
    CostModel,
    DecodeCost,
    LinkCost,
    PrefillCost,
    Reach,
    RestorePlan,
    Strategy,
    always_load,
    restore_strategy,
)
from jserve.cache.disk_tier import DiskTier
from jserve.cache.hierarchy import TieredCache
from jserve.cache.host_tier import HostTier
from jserve.cache.restore import GapLoad, Load, Read, Write
from jserve.config import EngineConfig, SchedConfig
from jserve.doors import EngineInfo
from jserve.engine import Engine
from jserve.request import EngineRequest, SamplingParams
from jserve.simulated import SimulatedClock, SimulatedExecutor, SimulatedTransfer, expected_tokens

VOCAB, BLOCK = 97, 4
CopyTime = Callable[[str, int], float]


def instant(kind: str, blocks: int) -> float:
    return 0.0


def make_cost() -> CostModel:
    link = LinkCost(bytes_per_s=1e9)
    return CostModel(PrefillCost(0.0, 1e-3, 0.0), DecodeCost(0.01), link, link, link, link, BLOCK, 1000)


class World:
    """An engine over three simulated tiers; `disk` may come from an earlier world."""

    def __init__(
        self,
        *,
        device: int = 12,
        host: int = 40,
        disk_blocks: int | None = 200,
        copy_s: CopyTime = instant,
        fails: Callable[[str], bool] = lambda kind: False,
        strategy: str | Strategy = "always",
        eviction: str = "lru",
        staging: int = 20,
        disk: dict[bytes, list[int]] | None = None,
        max_running: int = 4,
        wait_limit_s: float = 5.0,
        store_budget: int = 16,
        device_reuse: bool = True,
        orders_loads: bool = False,
        in_turn: bool = False,
        read_ahead_s: float = 0.0,
        sched: SchedConfig | None = None,
    ) -> None:
        self.clock = SimulatedClock()
        self.notes: list[str] = []
        executor = SimulatedExecutor(self.clock, device, BLOCK, VOCAB)
        self.transfer = SimulatedTransfer(
            self.clock, executor, host, copy_s, disk=disk, fails=fails, orders_loads=orders_loads, in_turn=in_turn
        )
        self.cache = TieredCache(
            device,
            BLOCK,
            self.transfer,
            HostTier(host, eviction),
            None if disk_blocks is None else DiskTier(disk_blocks, eviction, self.transfer.disk),
            cost=make_cost(),
            strategy=restore_strategy(strategy) if isinstance(strategy, str) else strategy,
            staging_blocks=staging,
            wait_limit_s=wait_limit_s,
            store_budget=store_budget,
            device_reuse=device_reuse,
            read_ahead_s=read_ahead_s,
            note=self.notes.append,
        )
        info = EngineInfo("simulated", "simulated", VOCAB, 1000, BLOCK, device, 16, "none", "simulated", 0, 0)
        config = EngineConfig(sched=sched or SchedConfig(max_running=max_running, token_budget=16))
        self.engine = Engine(config, info, executor, self.clock, self.cache)
        self.said: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int = 4) -> None:
        params = SamplingParams(max_tokens=max_tokens)
        self.engine.add(EngineRequest(request_id=name, token_ids=prompt, sampling=params))
        self.said[name] = []

    def step(self) -> None:
        for output in self.engine.step():
            self.said[output.request_id] += output.token_ids
            self.cached[output.request_id] = output.cached_tokens

    def run(self, most: int = 20_000) -> None:
        for _ in range(most):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"not done after {most} steps")

    def ask(self, name: str, prompt: list[int], max_tokens: int = 4) -> list[int]:
        self.add(name, prompt, max_tokens)
        self.run()
        assert self.said[name] == expected_tokens(prompt, max_tokens, VOCAB)
        return prompt + self.said[name]

    def check_books(self) -> None:
        """Every pin, slot and promise has somebody whose it is."""
        cache, host, tiers = self.cache, self.cache.host, self.cache.tiers
        pins = Counter(host._filling)
        pins.update(r.pin for r in (*tiers.restores, *cache.gaps.open) if r.pin is not None)
        taken = sum(restore.staging for restore in tiers.restores)
        taken += sum(gap.num_unread + len(gap.slots) for gap in cache.gaps.open)
        lent = sum(len(gap.slots) for gap in cache.gaps.open)
        writing = 0
        for operation in tiers.under_way.values():
            match operation:
                case Load():
                    pins.update(operation.pins)
                case GapLoad():
                    pins.update(operation.pins)
                    lent += len(operation.slots)
                    taken += len(operation.slots)
                case Write():
                    pins[operation.key] += 1
                    writing += 1
                case Read():
                    taken += operation.restore is not None and operation.restore.ended
        assert {key: entry.pins for key, entry in host._order._entries.items() if entry.pins} == dict(pins)
        assert cache.staging.taken == taken
        assert host.num_borrowed == lent
        slots = [*host._blank, *host._slot_of.values()]
        assert len(slots) + lent == host.num_slots
        assert len(set(slots)) == len(slots)
        if cache.disk is not None:
            assert cache.disk._writing == writing

    def check_nothing_is_held(self) -> None:
        cache = self.cache
        assert cache.pool.num_free == cache.num_blocks
        assert not cache.tiers.restores
        assert not cache._timed
        assert not cache.staging.unread
        assert not cache.gaps.open
        assert cache.staging.taken == cache.host.num_borrowed == 0
        assert abs(cache._queued_s) < 1e-9
        assert not any(cache.host.is_pinned(key) for key in list(cache.host._slot_of))


def with_gaps(rng: random.Random, share: float = 1.0) -> Strategy:
    """A strategy that leaves a gap, anywhere, in such a share of the prompts that have room for one."""

    def choose(model: CostModel, reach: Reach) -> RestorePlan:
        plan = always_load(model, reach)
        fronts = [reach.device_blocks] + [reach.host_blocks] * (reach.host_blocks > reach.device_blocks)
        front = rng.choice(fronts)
        end = rng.randint(front, min(reach.disk_blocks, reach.host_blocks + reach.staging_room_blocks))
        if end - front < 2 or rng.random() >= share:
            return plan
        start = rng.randint(front + 1, end - 1)
        computed = (start - front) * BLOCK + reach.prompt_tokens - end * BLOCK
        return replace(
            plan,
            load_host_blocks=front - reach.device_blocks,
            stage_disk_blocks=0,
            deferred_disk_blocks=0,
            gap=(start, end),
            recompute_tokens=computed,
            why="a gap",
        )

    return choose


def prompt_of(seed: int, tokens: int) -> list[int]:
    return [random.Random(seed).randrange(VOCAB) for _ in range(tokens)]
