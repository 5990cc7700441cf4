"""The real tiers: JAX copies, files, a small model. Wherever KV has been, the tokens are those of a plain run."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jserve import checkpoints, tiers
from jserve.cache.cost import CostModel, DecodeCost, LinkCost, PrefillCost, Strategy, by_cost
from jserve.cache.hierarchy import TieredCache
from jserve.cache.returns import GapModel
from jserve.config import CacheConfig, EngineConfig, Eviction, Preempt, RunnerConfig, SchedConfig
from jserve.engine import Engine
from jserve.errors import ConfigError
from jserve.progress import SilentProgress
from jserve.request import EngineOutput, EngineRequest, SamplingParams
from jserve.runner import Runner, make_mesh
from jserve.sched import yielding
from jserve.tiers import build_cache

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parent / "fixtures" / "models" / "llama2_gqa"
BLOCK, OUTPUT = 4, 6


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Calibrations of a model as small as this one must not stay on the machine."""
    monkeypatch.setattr("jserve.calibrate.cache_root", lambda: tmp_path_factory.getbasetemp() / "cache")


def block_gib(blocks: float) -> float:
    spec = checkpoints.load(MODEL, mesh=make_mesh(1), dtype=np.float32).spec
    return blocks * 2 * spec.num_layers * BLOCK * spec.num_kv_heads * spec.head_dim * 4 / 2**30


def make_engine(
    *,
    device: int,
    host: float = 0,
    disk: float = 1000,
    directory: Path | None = None,
    restore: str = "always",
    tp: int = 1,
    eviction: Eviction = "returns",
    **sched: Any,
) -> Engine:
    mesh = make_mesh(tp)
    loaded = checkpoints.load(MODEL, mesh=mesh, dtype=np.float32)
    config = EngineConfig(
        tp=tp,
        cache=CacheConfig(
            block_size=BLOCK,
            device_blocks=device,
            host_gib=block_gib(host),
            disk_dir=str(directory) if directory else None,
            disk_gib=block_gib(disk),
            restore=restore,
            eviction=eviction,
        ),
        sched=replace(SchedConfig(max_running=4, token_budget=32), **sched),
        runner=RunnerConfig(token_buckets=(8, 32)),
    )
    runner = Runner(config, loaded.model, loaded.spec, loaded.name, mesh, SilentProgress())
    return Engine(config, runner.info, runner, cache=build_cache(config, runner, SilentProgress()))


def chat(engine: Engine, turns: int = 3, pause: Callable[[], None] = lambda: None) -> dict[str, list[int]]:
    """Six users talk turn by turn, two at a time, and pause before each turn; what each was told."""
    rng = random.Random(3)
    history = {f"user{i}": [rng.randrange(3, engine.info.vocab_size) for _ in range(9 + i)] for i in range(6)}
    told: dict[str, list[int]] = {name: [] for name in history}
    for _ in range(turns):
        for pair in zip(*[iter(history)] * 2, strict=True):
            for name in pair:
                sampling = SamplingParams(max_tokens=OUTPUT)
                engine.add(EngineRequest(request_id=name, token_ids=list(history[name]), sampling=sampling))
            while engine.has_work:
                for output in engine.step():
                    history[output.request_id] += output.token_ids
                    told[output.request_id] += output.token_ids
            pause()
            for name in pair:
                history[name] += [rng.randrange(3, engine.info.vocab_size) for _ in range(4)]
    return told


@pytest.fixture(scope="module")
def plain() -> dict[str, list[int]]:
    return chat(make_engine(device=400))


def tiers_of(engine: Engine) -> TieredCache:
    assert isinstance(engine.cache, TieredCache)
    return engine.cache


def check_idle(engine: Engine) -> None:
    assert engine.stats().held_blocks == 0
    assert engine.stats().compiles_after_warmup == 0
    assert not tiers_of(engine).tiers.restores


@pytest.mark.parametrize(
    "tp", [1, pytest.param(2, marks=pytest.mark.skipif(jax.device_count() < 2, reason="one device"))]
)
def test_histories_come_back_from_the_host_with_the_same_tokens(plain: dict[str, list[int]], tp: int) -> None:
    engine = make_engine(device=24, host=400, tp=tp)
    assert chat(engine) == plain
    stats = tiers_of(engine).tier_stats
    assert stats.host_hit_tokens > 100
    assert stats.failed_loads == stats.expired_waits == 0
    check_idle(engine)


@pytest.mark.parametrize("restore", ["always", "never", "cost", "flashgen"])
def test_histories_come_back_from_disk_with_the_same_tokens(
    plain: dict[str, list[int]], tmp_path: Path, restore: str
) -> None:
    engine = make_engine(device=24, host=26, directory=tmp_path, restore=restore)
    assert chat(engine) == plain
    assert (tiers_of(engine).tier_stats.disk_hit_tokens > 0) == (restore == "always") or restore in ("cost", "flashgen")
    assert tiers_of(engine).tier_stats.written_blocks > 0
    check_idle(engine)
    engine.close()


def test_what_is_read_ahead_has_the_same_tokens(
    plain: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions are thrown at random here, so that much is read and much of it for nothing."""
    rng = random.Random(5)
    monkeypatch.setattr(GapModel, "gap_s", lambda model, tokens: 0.2 * rng.random())
    engine = make_engine(device=24, host=26, directory=tmp_path)
    tiers = tiers_of(engine).tiers
    tiers_of(engine).ahead.margin, tiers_of(engine).ahead.margin_errors = 1.0, 0.0

    def pause() -> None:
        for _ in range(5):
            time.sleep(0.01)
            tiers_of(engine).poll(engine.clock.now())
            while engine.has_work:
                engine.step()

    assert chat(engine, pause=pause) == plain
    assert tiers.stats.read_ahead_blocks > 0
    assert tiers.stats.failed_reads == 0
    check_idle(engine)
    engine.close()


def test_a_restart_finds_the_conversations_of_the_process_before_it(
    plain: dict[str, list[int]], tmp_path: Path
) -> None:
    before = make_engine(device=400, host=400, directory=tmp_path)
    chat(before)
    before.close()
    after = make_engine(device=400, host=400, directory=tmp_path)
    assert chat(after, turns=3) == plain
    first_turns = sum((8 + i) // BLOCK * BLOCK for i in range(6))
    assert tiers_of(after).tier_stats.disk_hit_tokens >= first_turns
    assert after.stats().cached_tokens > before.stats().cached_tokens
    after.close()


def as_if_slow(kind: str) -> Strategy:
    """The cost model's choice, as if this kind of copy took twice as long as computing: so both are done at once."""
    fast, slow = LinkCost(1e12), LinkCost(1 / (2e-3 * BLOCK))
    load, read = (slow, fast) if kind == "load" else (fast, slow)
    model = CostModel(PrefillCost(0.0, 1e-3, 0.0), DecodeCost(0.01), load, fast, read, fast, BLOCK, 1)
    return lambda _, reach: by_cost(model, reach)


@pytest.mark.parametrize("kind", ["load", "read"])
def test_prompts_that_are_computed_while_their_end_is_brought_have_the_same_tokens(
    plain: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """However slow this machine is: what is kept lower down is there before the next turn, and is waited for."""
    monkeypatch.setattr(TieredCache, "_gap_wait_s", lambda cache, gap: 60.0)
    engine = make_engine(device=24, host=400 if kind == "load" else 26, directory=tmp_path)
    tiers = tiers_of(engine)
    tiers.strategy = as_if_slow(kind)

    def pause() -> None:
        for _ in range(2000):
            tiers.poll(engine.clock.now())
            if not tiers.stats()["copies_in_flight"]:
                return
            time.sleep(0.001)

    assert chat(engine, pause=pause) == plain
    assert tiers.tier_stats.closed_gaps > 5
    assert (tiers.tier_stats.disk_hit_tokens > 0) == (kind == "read")
    check_idle(engine)
    assert not tiers.gaps.open
    assert tiers.host.num_borrowed == 0
    engine.close()


def test_a_gap_with_damaged_files_is_computed(plain: dict[str, list[int]], tmp_path: Path) -> None:
    before = make_engine(device=400, host=400, directory=tmp_path)
    chat(before)
    before.close()
    for path in itertools.islice(blocks_on_disk(tmp_path), 0, None, 3):
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
    after = make_engine(device=24, host=26, directory=tmp_path)
    tiers = tiers_of(after)
    tiers.strategy = as_if_slow("read")
    assert chat(after) == plain
    assert tiers.tier_stats.closed_gaps > 0
    assert tiers.tier_stats.failed_reads > 0
    check_idle(after)
    after.close()


def blocks_on_disk(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".json")


def test_damaged_files_are_never_served(plain: dict[str, list[int]], tmp_path: Path) -> None:
    before = make_engine(device=400, host=400, directory=tmp_path)
    chat(before)
    before.close()
    rng = random.Random(0)
    damaged = 0
    for path in itertools.islice(blocks_on_disk(tmp_path), 0, None, 2):
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        damaged += 1
    assert damaged > 10
    after = make_engine(device=400, host=400, directory=tmp_path)
    assert chat(after) == plain
    assert tiers_of(after).tier_stats.failed_reads > 0
    check_idle(after)
    after.close()


def test_other_weights_find_nothing_on_the_same_disk(tmp_path: Path) -> None:
    before = make_engine(device=400, host=400, directory=tmp_path)
    chat(before)
    before.close()
    other = make_engine(device=400, host=400, directory=tmp_path)
    leaf = before.info.fingerprint
    assert other.info.fingerprint == leaf
    other.close()
    mesh = make_mesh(1)
    loaded = checkpoints.load(MODEL, mesh=mesh, dtype=np.float32)
    norm = loaded.model.norm.weight  # type: ignore[attr-defined]
    norm.set_value(norm[...].at[3].add(1e-3))
    runner = Runner(before.config, loaded.model, loaded.spec, loaded.name, mesh, SilentProgress())
    assert runner.info.fingerprint != leaf


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"disk_dir": "/somewhere"}, "cache.host_gib is 0.0: the disk tier is read and written through host memory"),
        ({"host_gib": -1.0}, "cache.host_gib is -1.0"),
        ({"host_gib": 1.0, "prefix_cache": False}, "cache.prefix_cache is False"),
        ({"host_gib": 1.0, "disk_gib": 0.0}, "cache.disk_gib is 0.0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CacheConfig(**config)  # type: ignore[arg-type]


def test_a_tier_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache\.host_gib is .*, less than one block"):
        make_engine(device=24, host=0.5)
    with pytest.raises(ConfigError, match="there is no restore strategy 'sometimes'"):
        make_engine(device=24, host=8, restore="sometimes")
    place = tmp_path / "file"
    place.write_text("no directory")
    with pytest.raises(ConfigError, match="KV blocks cannot be kept in"):
        make_engine(device=24, host=8, directory=place)


@pytest.mark.parametrize("preempt", ["recompute", "swap", "auto"])
def test_preempted_at_random_steps_everybody_is_told_the_same(plain: dict[str, list[int]], preempt: Preempt) -> None:
    engine = make_engine(device=60, host=400, preempt=preempt)
    scheduler, step, rng = engine.scheduler, engine.step, random.Random(5)

    def disturbed(max_steps: int = 1) -> list[EngineOutput]:
        if scheduler.running and rng.random() < 0.25:
            victim = rng.choice(scheduler.running)
            yielding.preempt(scheduler.state, victim, victim)
        return step(max_steps)

    engine.step = disturbed  # type: ignore[method-assign]
    assert chat(engine) == plain
    assert engine.stats().preemptions > 10
    assert (scheduler.stats.swaps > 0) == (preempt != "recompute") or preempt == "auto"
    check_idle(engine)


@pytest.mark.parametrize("preempt", ["recompute", "swap", "auto"])
def test_who_takes_turns_is_told_the_same(plain: dict[str, list[int]], preempt: Preempt) -> None:
    one_at_a_time = {"max_running": 1, "order": "pace", "turn_tokens": 2, "ahead_s": 0.0}
    engine = make_engine(device=60, host=400, preempt=preempt, **one_at_a_time)
    assert chat(engine) == plain
    assert engine.stats().preemptions >= 9, "the first of each pair yields to the second, at least once"
    check_idle(engine)


def test_more_host_memory_than_xla_pins_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        block_bytes, shares_cores = 1 << 20, False

    monkeypatch.setattr("jserve.tiers.available_host_bytes", lambda: 1 << 50)
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    assert tiers._host_blocks(64.0, OnGpu) == 64 << 10  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"pins 64 GiB .* XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=225"):
        tiers._host_blocks(224.0, OnGpu)  # type: ignore[arg-type]
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "225")
    assert tiers._host_blocks(224.0, OnGpu) == 224 << 10  # type: ignore[arg-type]
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "much")
    with pytest.raises(ConfigError, match="'much': use a number"):
        tiers._host_blocks(224.0, OnGpu)  # type: ignore[arg-type]
