"""What the parts of the scheduler share: the cache, who runs and who waits, the policies in use, and what is counted.

`scheduler` owns it. `filling`, `prefills`, `decodes` and `yielding` are functions over it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jserve.cache.kv_cache import KVCache
from jserve.sched.admission import FairShares
from jserve.sched.events import EventLog
from jserve.sched.order import Order
from jserve.sched.preemption import Swaps
from jserve.sched.running import Running
from jserve.sched.turns import Turns
from jserve.sched.victim import Victim
from jserve.sched.waiting import Waiting


@dataclass
class SchedStats:
    """Counters since start."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of admitted requests, each counted once."""
    cached_tokens: int = 0
    """Those of them whose KV was found."""
    preemptions: int = 0
    swaps: int = 0
    """Those of them that were swapped out to the host."""
    promotions: int = 0
    """Times that a request started while another one waited before it."""
    ended_blocks: int = 0
    """Blocks that requests held when they ended."""
    overrun_tokens: int = 0
    """Tokens computed past the end of a request, because its end was not known yet."""


@dataclass(slots=True)
class State:
    """See the module."""

    cache: KVCache
    running: Running
    waiting: Waiting
    order: Order
    victim: Victim
    swaps: Swaps
    shares: FairShares
    turns: Turns
    promote_tokens: int | None = None
    """Who has more to compute passes nobody; None is no limit."""
    events: EventLog = field(default_factory=EventLog)
    stats: SchedStats = field(default_factory=SchedStats)
    waiting_tokens: int = 0
    """Of the prompts that have not started yet."""
