"""A picture of the KV cache over time: how full each tier is, and where the prompts' tokens were found.

`CacheHistory` keeps samples of the statistics in bounded memory; `draw` makes the picture of them. matplotlib is
imported when it is needed: it comes with the extra `notebook`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from jserve.engine_loop import CACHE_STAT
from jserve.errors import Unsupported

FIRST_INTERVAL_S = 0.25
MOST_SAMPLES = 1024
WINDOW_SHARE = 0.05
"""Hit shares are those of the last part of the samples, this large."""
TIERS = ("device", "host", "disk")
_COLORS = dict(zip(TIERS, ("tab:blue", "tab:orange", "tab:green"), strict=True))


@dataclass(frozen=True, slots=True)
class CacheSample:
    """The cache at one time."""

    time_s: float
    used: tuple[float, ...]
    """Of each tier, the share of its blocks that hold KV; 0 where there is no such tier."""
    prompt_tokens: float
    """Since start, as are the hits."""
    hit_tokens: tuple[float, ...]
    """Prompt tokens that each tier had, and no tier above it."""

    @classmethod
    def of(cls, time_s: float, stats: Mapping[str, float]) -> CacheSample:
        """From the statistics by their full names, as `LLM.stats` and `Client.stats` give them."""

        def cache(name: str, default: float = 0.0) -> float:
            return stats.get(f"{CACHE_STAT}{name}", default)

        device = cache("device_held_blocks") + cache("device_cached_blocks")
        host, disk = cache("host_hit_tokens"), cache("disk_hit_tokens")
        return cls(
            time_s,
            (
                device / cache("device_blocks", 1),
                cache("host_used_blocks") / cache("host_blocks", 1),
                cache("disk_used_blocks") / cache("disk_blocks", 1),
            ),
            stats["prompt_tokens"],
            (max(0.0, stats["cached_tokens"] - host - disk), host, disk),
        )


class CacheHistory:
    """Samples from the start until now, at most MOST_SAMPLES: when there are more, every other one goes.

    Filled by one thread; any thread may take `samples`.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._start_s = clock()
        self._interval_s = FIRST_INTERVAL_S
        self._next_s = self._start_s
        self._samples: list[CacheSample] = []

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next sample."""
        return self._clock() >= self._next_s

    def sample(self, stats: Mapping[str, float]) -> CacheSample:
        """The cache now, not kept. `stats` as for `CacheSample.of`."""
        return CacheSample.of(self._clock() - self._start_s, stats)

    def add(self, stats: Mapping[str, float]) -> None:
        samples = [*self._samples, self.sample(stats)]
        if len(samples) > MOST_SAMPLES:
            samples = samples[::2]
            self._interval_s *= 2
        self._samples, self._next_s = samples, self._clock() + self._interval_s

    @property
    def samples(self) -> Sequence[CacheSample]:
        return tuple(self._samples)


def hit_shares(samples: Sequence[CacheSample]) -> list[tuple[float, ...]]:
    """Of the prompt tokens that came in the window before each sample: the share found in each tier."""
    window = max(1, round(WINDOW_SHARE * len(samples)))
    shares = []
    for i, now in enumerate(samples):
        then = samples[max(0, i - window)]
        prompts = now.prompt_tokens - then.prompt_tokens
        hits = zip(now.hit_tokens, then.hit_tokens, strict=True)
        shares.append(tuple((a - b) / prompts if prompts > 0 else 0.0 for a, b in hits))
    return shares


@dataclass(frozen=True)
class CachePlot:
    """A matplotlib figure, which a notebook shows as it is."""

    figure: Any

    def save(self, path: str | Path) -> None:
        """As PNG, SVG or PDF, by the name's ending."""
        self.figure.savefig(path)

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.figure.savefig(image, format="png")
        return image.getvalue()


def draw(samples: Sequence[CacheSample]) -> CachePlot:
    """Occupancy of the tiers above, hit shares below. Raises Unsupported without matplotlib."""
    try:
        from matplotlib.figure import Figure  # of its own: no display, and no state of pyplot's
    except ImportError:
        raise Unsupported("the picture needs matplotlib, which is missing: pip install 'jserve[notebook]'") from None
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    times_s = [sample.time_s for sample in samples]
    for i, tier in enumerate(TIERS):
        above.plot(times_s, [sample.used[i] for sample in samples], label=tier, color=_COLORS[tier])
    shares = list(zip(*hit_shares(samples), strict=True)) or [()] * len(TIERS)
    below.stackplot(times_s, *shares, labels=TIERS, colors=_COLORS.values(), alpha=0.7)
    above.set(title="KV cache", ylabel="share of blocks in use", ylim=(0, 1.02))
    below.set(ylabel="share of prompt tokens found", ylim=(0, 1.02), xlabel="seconds")
    for axes in (above, below):
        axes.legend(loc="upper left", fontsize="small")
        axes.grid(True, alpha=0.2)
    return CachePlot(figure)
