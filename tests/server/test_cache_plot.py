"""The cache's picture: bounded samples, hit shares of the recent past, and an image without any display."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from byte_model import byte_tokenizer
from simulated_engine import make

from jserve.cache_plot import MOST_SAMPLES, CacheHistory, CacheSample, draw, hit_shares
from jserve.config import EngineConfig
from jserve.errors import Unsupported
from jserve.llm import LLM
from jserve.progress import SilentProgress

PNG = b"\x89PNG"


def stats(prompt_tokens: float = 100, cached_tokens: float = 70, **cache: float) -> dict[str, float]:
    device = {"device_blocks": 10.0, "device_held_blocks": 3.0, "device_cached_blocks": 2.0}
    named = {f"cache_{name}": value for name, value in (device | cache).items()}
    return {"prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens} | named


def test_a_sample_tells_each_tier_apart() -> None:
    tiers = {"host_blocks": 8.0, "host_used_blocks": 2.0, "disk_blocks": 4.0, "disk_used_blocks": 4.0}
    sample = CacheSample.of(1.0, stats(**tiers, host_hit_tokens=30, disk_hit_tokens=15))
    assert sample.used == (0.5, 0.25, 1.0)
    assert sample.hit_tokens == (25, 30, 15)


def test_a_cache_without_tiers_has_empty_ones() -> None:
    sample = CacheSample.of(1.0, stats())
    assert (sample.used, sample.hit_tokens) == ((0.5, 0.0, 0.0), (70, 0, 0))


def test_a_long_history_keeps_its_whole_length_in_bounded_memory() -> None:
    now_s = 0.0

    def clock() -> float:
        return now_s

    history = CacheHistory(clock)
    for _ in range(20 * MOST_SAMPLES):
        if history.is_due:
            history.add(stats())
        now_s += 0.25
    times_s = [sample.time_s for sample in history.samples]
    assert MOST_SAMPLES / 2 <= len(times_s) <= MOST_SAMPLES
    assert times_s == sorted(times_s)
    assert times_s[0] == 0
    assert times_s[-1] > 0.95 * now_s


def test_hit_shares_are_those_of_the_recent_past() -> None:
    samples = [
        CacheSample(0, (0, 0, 0), 0, (0, 0, 0)),
        CacheSample(1, (0, 0, 0), 100, (0, 0, 0)),
        CacheSample(2, (0, 0, 0), 200, (50, 25, 0)),
        CacheSample(3, (0, 0, 0), 200, (50, 25, 0)),
    ]
    assert hit_shares(samples) == [(0, 0, 0), (0, 0, 0), (0.5, 0.25, 0), (0, 0, 0)]


def test_an_llm_draws_what_its_cache_did(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with LLM.from_engine(make(EngineConfig(), SilentProgress()), byte_tokenizer()) as llm:
        for _ in range(3):
            llm.generate("the same words again, long enough for some blocks", max_tokens=4)
        plot = llm.plot_cache()
    above, below = plot.figure.axes
    assert [line.get_label() for line in above.get_lines()] == ["device", "host", "disk"]
    assert above.get_lines()[0].get_ydata()[-1] > 0
    assert below.get_ylabel() == "share of prompt tokens found"
    assert plot._repr_png_().startswith(PNG)
    plot.save(tmp_path / "cache.png")
    assert (tmp_path / "cache.png").read_bytes().startswith(PNG)


def test_without_samples_there_is_still_a_picture() -> None:
    pytest.importorskip("matplotlib")
    assert draw([])._repr_png_().startswith(PNG)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unsupported, match=r"pip install 'jserve\[notebook\]'"):
        draw([])
