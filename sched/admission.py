"""Who may join the queue: within its bounds, within its tenant's share, and only if it can be served in time.

Each rule is a pure function of a snapshot; `refusal` asks them in turn. Refusing early costs nothing, while a request
that waits for longer than its user does costs everybody behind it (Mooncake §7: reject before the prefill).

`FairShares` gives requests their places in the queue, so that tenants that compete are served by their weights
(start-time fair queueing, Goyal, Vin and Cheng 1996). With one tenant that is the order of arrival.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CROWDED = 0.5
"""Share of the queue from which on a tenant may hold no more than its own share of it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the queue takes."""

    requests: int
    """Open at once, running and waiting."""
    tokens: int | None = None
    """Of waiting prompts; None is no bound."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one request meets when it arrives."""

    requests: int
    """Open now."""
    running: int
    """How many of them may run at once."""
    waiting_tokens: int
    tokens: int
    """Of its own prompt."""
    tenant_requests: int = 0
    """Of its tenant, open now."""
    share: float = 1.0
    """Its tenant's weight among those of all tenants that are known or have a request open."""
    prefill_s: float = 0.0
    """What its own prompt is predicted to take."""
    queued_prefill_s: float = 0.0
    """What the prompts before it are predicted to take."""
    missing_blocks: int = 0
    """Blocks that it and those before it lack."""
    freed_blocks_per_s: float = 0.0
    """Blocks that ending requests have lately given back; 0 if that is not known."""
    limit_s: float | None = None
    """When its first token is due: the request's SLO, or its deadline if that is sooner."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not taken, and when it might be."""

    reason: str
    retry_after_s: float
    predicted_ttft_s: float


def predicted_ttft_s(load: Load) -> float:
    """Time to first token: its own prompt, after those before it, or once enough blocks have come free for it."""
    memory_s = load.missing_blocks / load.freed_blocks_per_s if load.freed_blocks_per_s else 0.0
    return max(load.queued_prefill_s, memory_s) + load.prefill_s


def refusal(load: Load, bounds: Bounds) -> Refusal | None:
    """Why it is refused, or None."""
    ttft_s = predicted_ttft_s(load)
    drained_s = max(1.0, ttft_s - load.prefill_s)
    if load.requests >= bounds.requests:
        waiting = load.requests - load.running
        reason = f"{waiting} requests are waiting, the most this server takes: retry later"
        return Refusal(reason, drained_s, ttft_s)
    if bounds.tokens is not None and load.waiting_tokens + load.tokens > bounds.tokens:
        reason = (
            f"{load.waiting_tokens} tokens are waiting, and with the {load.tokens} of this prompt they would be more "
            f"than the {bounds.tokens} that this server takes: retry later"
        )
        return Refusal(reason, drained_s, ttft_s)
    if load.requests >= CROWDED * bounds.requests and load.tenant_requests >= load.share * bounds.requests:
        reason = (
            f"this tenant has {load.tenant_requests} requests open, its share of a crowded queue "
            f"({load.share:.0%} of {bounds.requests}): retry later"
        )
        return Refusal(reason, drained_s, ttft_s)
    if load.limit_s is not None and ttft_s > load.limit_s:
        reason = (
            f"the first token is predicted in {ttft_s:.3g} s, and due in {load.limit_s:.3g} s: retry later, "
            "or allow more time"
        )
        return Refusal(reason, max(0.1, ttft_s - load.limit_s), ttft_s)
    return None


class FairShares:
    """Places in the queue, by tenant. A place is a virtual time: one average request of weight 1 takes 1."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._ends: dict[str, float] = {}
        self._now = 0.0
        self._tokens = 0
        self._requests = 0

    def weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def place(self, tenant: str) -> float:
        """Of a request that comes now: behind its tenant's own, and not before what is being served."""
        return max(self._now, self._ends.get(tenant, 0.0))

    def take_place(self, tenant: str, tokens: int) -> float:
        """It has come."""
        start = self.place(tenant)
        self._requests += 1
        self._tokens += tokens
        average = self._tokens / self._requests
        self._ends[tenant] = start + tokens / average / self.weight(tenant)
        return start

    def serve(self, place: float) -> None:
        """The request of this place has started."""
        if place <= self._now:
            return
        self._now = place
        if len(self._ends) > 1024:  # tenants that come and go must not grow this for ever
            self._ends = {tenant: end for tenant, end in self._ends.items() if end > place}

    def share(self, tenant: str, open_requests: Mapping[str, int]) -> float:
        """Its weight among those of the named tenants and of all with a request open."""
        present = self._weights.keys() | open_requests.keys() | {tenant}
        return self.weight(tenant) / sum(map(self.weight, present))
