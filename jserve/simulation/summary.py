"""The numbers of a run: throughput and latencies, and where histories were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jserve.errors import ConfigError
from jserve.simulation.gauges import Observed
from jserve.simulation.playing import CallRecord, Played


@dataclass(frozen=True)
class Summary:
    """Over the calls that were sent after the warm-up and have ended."""

    calls: int
    refused: int
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    normalised_latency_s: float
    """Mean of end-to-end latency over output tokens."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    tpot_p99_s: float
    cached_share: float
    """Of prompt tokens, histories included."""
    device_hit_share: float
    """As `cached_share`, by the tier that had them."""
    host_hit_share: float
    disk_hit_share: float
    preemptions: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-len(ordered) * percent // 100) - 1))]


def measured(played: Played) -> list[CallRecord]:
    """The calls that count, the refused ones included."""
    return [call for call in played.calls if call.sent_s >= played.warm_s]


def summarise(played: Played) -> Summary:
    """ConfigError if nothing counts."""
    counted = measured(played)
    calls = [call for call in counted if not call.refused]
    if not calls:
        why = next((call.refused for call in counted), "the warm-up took all of the work")
        raise ConfigError(f"no request of {played.work.name} was served: {why}")
    seconds = max(call.end_s for call in calls) - (played.warm_s or min(call.sent_s for call in calls))
    # What ended in the time counts, whenever it was sent.
    ended = [call for call in played.calls if not call.refused and call.end_s > played.warm_s]
    ttfts, tpots = [call.ttft_s for call in calls], [call.tpot_s for call in calls if call.output_tokens > 1] or [0.0]
    device, host, disk = _hit_shares(played)
    return Summary(
        calls=len(calls),
        refused=len(counted) - len(calls),
        seconds=seconds,
        requests_per_s=len(ended) / seconds,
        output_tokens_per_s=sum(call.output_tokens for call in ended) / seconds,
        normalised_latency_s=sum(call.normalised_s for call in calls) / len(calls),
        ttft_mean_s=sum(ttfts) / len(ttfts),
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p95_s=percentile(ttfts, 95),
        ttft_p99_s=percentile(ttfts, 99),
        tpot_p50_s=percentile(tpots, 50),
        tpot_p95_s=percentile(tpots, 95),
        tpot_p99_s=percentile(tpots, 99),
        cached_share=sum(c.cached_tokens for c in calls) / sum(c.prompt_tokens for c in calls),
        device_hit_share=device,
        host_hit_share=host,
        disk_hit_share=disk,
        preemptions=_since_warm(played, "preemptions"),
    )


def _hit_shares(played: Played) -> tuple[float, float, float]:
    """Of the prompt tokens of requests admitted since the warm-up: found on device, host and disk."""
    prompts = _since_warm(played, "prompt_tokens") or 1.0
    host, disk = _since_warm(played, "cache_host_hit_tokens"), _since_warm(played, "cache_disk_hit_tokens")
    device = max(0.0, _since_warm(played, "cached_tokens") - host - disk)
    return device / prompts, host / prompts, disk / prompts


def _since_warm(played: Played, name: str) -> float:
    return played.stats_after.get(name, 0.0) - played.stats_before.get(name, 0.0)


def mean_batch(run: Observed) -> float:
    """Requests in a step, over the time that steps ran."""
    return run.gauges.mean("running", run.played.warm_s)


def kv_utilisation(run: Observed) -> float:
    """Share of the device's blocks that requests held, over the same time."""
    return run.gauges.mean("held", run.played.warm_s)
