"""The compared systems, each a configuration of the one engine: nothing else differs between two arms.

| arm | device | host and disk | what is loaded | order |
|---|---|---|---|---|
| `vllm` | prefix cache, LRU | - | - | first come, first served; stops at the first that does not fit |
| `cachedattention` | keeps nothing between turns | look-ahead fetch and eviction | whatever any tier has | the same |
| `flashgen-sched` | prefix cache | - | - | greedy, with preemption of what has passed (FlashGen §4) |
| `flashgen-cache` | prefix cache | inclusive, LRU | disk only if another request waits (FlashGen §3.3) | first come |
| `flashgen` | prefix cache | as `flashgen-cache` | as `flashgen-cache` | as `flashgen-sched` |
| `jserve` | prefix cache | evicted, read ahead by predicted return | by a cost model, up to a split point | by pace |

What is preempted is computed again, or read back as far as the host happens to have it; `jserve` may also copy out the
rest, if that is quicker, and takes prompts in chunks that adapt to the latency targets. By pace is greedy with
preemption too, and answers far ahead of their readers yield to who waits (`sched.turns`).
CachedAttention keeps and evicts whole sessions; here it may keep their heads, which can only help it. `ablations` are
the `jserve` arm with one of its own choices taken back to FlashGen's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from jserve.config import CacheConfig, SchedConfig
from jserve.errors import ConfigError

Policies = tuple[CacheConfig, SchedConfig]


@dataclass(frozen=True)
class Arm:
    """A named way to serve: given the sizes of the tiers and the limits of a step, the settings."""

    name: str
    what: str
    tiers: bool
    """Whether it keeps histories in host memory and on disk."""
    apply: Callable[[CacheConfig, SchedConfig], Policies]

    def policies(self, cache: CacheConfig, sched: SchedConfig) -> Policies:
        """`cache` and `sched` give sizes alone: the arm sets what chooses. What is newer than the published systems is
        off but for the arm that turns it on."""
        cache = replace(cache, eviction="lru", read_ahead_s=0.0)
        if not self.tiers:
            cache = replace(cache, host_gib=0.0, disk_dir=None)
        return self.apply(cache, sched)


def _vllm(cache: CacheConfig, sched: SchedConfig) -> Policies:
    return cache, replace(sched, order="fcfs")


def _cachedattention(cache: CacheConfig, sched: SchedConfig) -> Policies:
    kept = replace(cache, device_reuse=False, restore="always", eviction="lookahead")
    return kept, replace(sched, order="fcfs")


def _flashgen_sched(cache: CacheConfig, sched: SchedConfig) -> Policies:
    return cache, replace(sched, order="flashgen")


def _flashgen_cache(cache: CacheConfig, sched: SchedConfig) -> Policies:
    return replace(cache, restore="flashgen"), replace(sched, order="fcfs")


def _flashgen(cache: CacheConfig, sched: SchedConfig) -> Policies:
    return replace(cache, restore="flashgen"), replace(sched, order="flashgen")


def _jserve(cache: CacheConfig, sched: SchedConfig) -> Policies:
    foreseeing = replace(cache, restore="cost", eviction="returns", read_ahead_s=CacheConfig().read_ahead_s)
    return foreseeing, replace(sched, order="pace", preempt="auto", chunk="adaptive")


ARMS = {
    arm.name: arm
    for arm in (
        Arm("vllm", "prefix cache on the device alone, first come first served", False, _vllm),
        Arm("cachedattention", "sessions in host memory and on disk, nothing on the device", True, _cachedattention),
        Arm("flashgen-cache", "three tiers, first come first served", True, _flashgen_cache),
        Arm("flashgen-sched", "reordering alone", False, _flashgen_sched),
        Arm("flashgen", "three tiers and reordering", True, _flashgen),
        Arm("jserve", "three tiers by a cost model, reordering", True, _jserve),
    )
}


def _without_cost_model(cache: CacheConfig, sched: SchedConfig) -> Policies:
    cache, sched = _jserve(cache, sched)
    return replace(cache, restore="flashgen"), sched


def _always(cache: CacheConfig, sched: SchedConfig) -> Policies:
    cache, sched = _jserve(cache, sched)
    return replace(cache, restore="always"), sched


def _lru(cache: CacheConfig, sched: SchedConfig) -> Policies:
    cache, sched = _jserve(cache, sched)
    return replace(cache, eviction="lru"), sched


def _without_read_ahead(cache: CacheConfig, sched: SchedConfig) -> Policies:
    cache, sched = _jserve(cache, sched)
    return replace(cache, read_ahead_s=0.0), sched


def _recompute(cache: CacheConfig, sched: SchedConfig) -> Policies:
    cache, sched = _jserve(cache, sched)
    return cache, replace(sched, preempt="recompute")


def _static_chunks(cache: CacheConfig, sched: SchedConfig) -> Policies:
    cache, sched = _jserve(cache, sched)
    return cache, replace(sched, chunk="static")


def _by_arrival(cache: CacheConfig, sched: SchedConfig) -> Policies:
    cache, sched = _jserve(cache, sched)
    return cache, replace(sched, order="flashgen")


def _without_reordering(cache: CacheConfig, sched: SchedConfig) -> Policies:
    cache, sched = _jserve(cache, sched)
    return cache, replace(sched, order="fcfs")


ABLATIONS = {
    arm.name: arm
    for arm in (
        Arm("jserve, restore=flashgen", "the disk only if another request waits", True, _without_cost_model),
        Arm("jserve, restore=always", "whatever any tier has, never a split", True, _always),
        Arm("jserve, eviction=lru", "least recently used first, however soon it is due", True, _lru),
        Arm("jserve, no read-ahead", "the disk is read once a request has come", True, _without_read_ahead),
        Arm("jserve, preempt=recompute", "never copied out to be copied back", True, _recompute),
        Arm("jserve, chunk=static", "chunks of prompts up to the token budget, always", True, _static_chunks),
        Arm("jserve, order=flashgen", "nobody yields for being ahead of its reader", True, _by_arrival),
        Arm("jserve, order=fcfs", "nobody passes one that does not fit", True, _without_reordering),
    )
}
"""The `jserve` arm with one of its choices taken back: what it loses is what the choice gains."""


def arm(name: str) -> Arm:
    """By name; ConfigError tells those that there are."""
    known = ARMS | ABLATIONS
    if name not in known:
        raise ConfigError(f"there is no policy {name!r}: use one of {', '.join(ARMS)}")
    return known[name]
