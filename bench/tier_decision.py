"""What deciding costs: `TieredCache.arrive` for long prompts, a third of each on the device, the host and disk.

The decision is that of the cost model, with the numbers of a Llama-2-70B on an A100 pair and one NVMe drive, for which
it restores all that is there. In the time is all that happens before the request is in the queue: looking its prefix up
in the three tiers, choosing, pinning what the host has, promising the staging region. Not in it, and told apart: making
the blocks' keys, which a cache without tiers does as well; and, for each block, to start its read from disk and to note
that it has come, which the polls of the steps that follow do. No byte moves.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jserve.cache.block_keys import extend_keys, root_key
from jserve.cache.cost import CostModel, DecodeCost, LinkCost, PrefillCost, Reach, by_cost, restore_strategy
from jserve.cache.disk_tier import DiskTier
from jserve.cache.hierarchy import TieredCache
from jserve.cache.host_tier import HostTier
from jserve.cache.kv_cache import BlockTable
from jserve.cache.transfer import Completion

BLOCK = 16
SHORTEST, LONGEST = 2048, 8192
"""Tokens of a prompt."""
COST = CostModel(
    prefill=PrefillCost.from_flops(69e9, 80, 8192, 2 * 312e12),
    decode=DecodeCost(0.03),
    host_to_device=LinkCost(2 * 25e9, 1e-5),
    device_to_host=LinkCost(2 * 25e9, 1e-5),
    disk_read=LinkCost(3.5e9, 1e-4),
    disk_write=LinkCost(3e9, 1e-4),
    block_tokens=BLOCK,
    block_bytes=5 << 20,
    blocks_per_copy=16,
)


class Nowhere:
    """A Transfer door behind which reads end at once and nothing else does."""

    in_turn = False

    def __init__(self) -> None:
        self._read: list[int] = []

    def store(self, ticket: int, blocks: list[int], host_slots: list[int]) -> None:
        pass

    def load(self, ticket: int, host_slots: list[int], blocks: list[int]) -> bool:
        return False

    def write(self, ticket: int, host_slot: int, key: bytes) -> None:
        pass

    def read(self, ticket: int, key: bytes, host_slot: int) -> None:
        self._read.append(ticket)

    def delete(self, key: bytes) -> None:
        pass

    def cancel(self, ticket: int) -> None:
        pass

    def poll(self) -> list[Completion]:
        ended, self._read = self._read, []
        return [Completion(ticket) for ticket in ended]

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Decisions:
    """Seconds, one entry a prompt."""

    arrive_s: list[float] = field(default_factory=list)
    """Its blocks' keys were known."""
    arrive_and_hash_s: list[float] = field(default_factory=list)
    strategy_s: list[float] = field(default_factory=list)
    """The choice alone, from what is known of the tiers."""
    stage_block_s: list[float] = field(default_factory=list)
    """Of the polls that follow, for each block that is read."""
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Prompt:
    tokens: list[int]
    keys: list[bytes]

    @property
    def device_blocks(self) -> int:
        return len(self.keys) // 3

    @property
    def host_blocks(self) -> int:
        return 2 * self.device_blocks


def measure(prompts: int, seed: int = 0, tick: Callable[[], None] = lambda: None) -> Decisions:
    """Each prompt arrives once, every second one without keys."""
    root = root_key("bench")
    drawn = [_draw(random.Random(f"{seed} {i}"), root) for i in range(prompts)]
    cache = _populated(drawn, root)
    found = Decisions()
    for i, prompt in enumerate(drawn):
        table = BlockTable(root, keys=[] if i % 2 else list(prompt.keys))
        start_s = time.perf_counter()
        cache.arrive(table, prompt.tokens, waiting=1)
        taken_s = time.perf_counter() - start_s
        (found.arrive_and_hash_s if i % 2 else found.arrive_s).append(taken_s)
        on_disk = len(prompt.keys) - prompt.host_blocks
        start_s = time.perf_counter()
        while not cache.is_ready(table):
            cache.poll(0.0)
        found.stage_block_s.append((time.perf_counter() - start_s) / on_disk)
        cache.release(table)
        reach = Reach(
            len(prompt.tokens), prompt.device_blocks, prompt.host_blocks, len(prompt.keys), waiting=1, hidden_s=0.1
        )
        start_s = time.perf_counter()
        by_cost(COST, reach)
        found.strategy_s.append(time.perf_counter() - start_s)
        found.blocks.append(len(prompt.keys))
        tick()
    return found


def _draw(rng: random.Random, root: bytes) -> _Prompt:
    tokens = [rng.randrange(32000) for _ in range(rng.randint(SHORTEST, LONGEST))]
    keys: list[bytes] = []
    extend_keys(keys, root, tokens, BLOCK)
    return _Prompt(tokens, keys)


def _populated(prompts: list[_Prompt], root: bytes) -> TieredCache:
    """A third of each prompt on the device, two thirds on the host (it keeps what the device has), all on disk."""
    on_device = sum(prompt.device_blocks for prompt in prompts)
    everywhere = sum(len(prompt.keys) for prompt in prompts)
    longest = LONGEST // BLOCK
    cache = TieredCache(
        on_device + longest,
        BLOCK,
        Nowhere(),
        HostTier(everywhere + longest),
        DiskTier(everywhere, present=[key for prompt in prompts for key in prompt.keys]),
        cost=COST,
        strategy=restore_strategy("cost"),
        staging_blocks=longest,
    )
    for prompt in prompts:
        table = BlockTable(root, keys=list(prompt.keys))
        computed = prompt.device_blocks * BLOCK
        assert cache.admit(table, prompt.tokens[: computed + 1]) is not None, "the pool has room for all"
        cache.publish(table, prompt.tokens, computed)
        cache.release(table)
        for i, key in enumerate(prompt.keys[: prompt.host_blocks]):
            cache.host.reserve(key, prompt.keys[i - 1] if i else None)
            cache.host.fill(key, write_back=False)
    return cache
