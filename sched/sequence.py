"""A request inside the scheduler: its tokens, how far its KV has been computed, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from jserve.cache.kv_cache import BlockTable
from jserve.request import FinishReason, SamplingParams, Terms
from jserve.sched.order import Rank

NO_TERMS = Terms()


class Phase(Enum):
    WAITING = "waiting"
    LOADING = "loading"
    """Holds a slot and its blocks, and waits for their KV to come from the host."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation. `tokens` are the known ones; `in_flight` more are sampled in steps that are not read yet."""

    request_id: str
    tokens: list[int]
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    table: BlockTable
    max_tokens_total: int
    """Prompt and output together end here."""
    num_prompt: int = 0
    terms: Terms = NO_TERMS
    arrival_s: float = 0.0
    """On the engine's clock."""
    prefill_s: float = 0.0
    """What its prompt was predicted to take."""
    place: float = 0.0
    """Its place among all tenants' requests (`admission.FairShares`)."""
    rank: Rank = (0.0, 0)
    """Its place in the order of the queue: the least is first (`order`)."""
    arrival_rank: Rank = (0.0, 0)
    """The one that it was given first; where the order has turns, it moves (`turns`)."""
    turn_limit: int = 0
    """With so many tokens of output its turn is over."""
    num_computed: int = 0
    """Leading tokens whose KV is in the cache, or will be when the launched steps have run."""
    in_flight: int = 0
    slot: int = -1
    """Row of the executor's per-request device state, while running."""
    phase: Phase = Phase.WAITING
    finish_reason: FinishReason | None = None
    num_cached: int = -1
    """Prompt tokens found in the cache at first admission; -1 before it."""
    decode_limit: int = 0
    """While it decodes: once so many tokens are computed, it needs another block, or has computed its last token."""
    news_limit: int = 0
    """With so many known tokens, the next one has more to it than to be appended: a full block to publish, its end, or
    that it does not run."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, those in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt


def rank_of(sequence: Sequence) -> Rank:
    """The key of every list that is in order of rank."""
    return sequence.rank
