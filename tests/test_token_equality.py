"""Greedy tokens in float32 are the same whatever the engine does to get them.

Each case runs one workload of multi-turn conversations with shared prefixes on the real engine, and compares every
token with a plain run: one request at a time, no cache reuse, one chunk, no overlap, one device.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from jserve import checkpoints
from jserve.config import AttentionBackend, CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.engine import Engine
from jserve.progress import SilentProgress
from jserve.request import EngineRequest, SamplingParams
from jserve.runner import Runner, make_mesh

pytestmark = pytest.mark.gpu
MODELS = Path(__file__).parent / "fixtures" / "models"
TURNS, OUTPUT = 3, 9


@functools.cache
def runner_parts(name: str, tp: int) -> tuple[checkpoints.LoadedModel, jax.sharding.Mesh]:
    mesh = make_mesh(tp)
    return checkpoints.load(MODELS / name, mesh=mesh, dtype=np.float32), mesh


def make_engine(
    model: str = "llama2_gqa",
    *,
    tp: int = 1,
    blocks: int = 200,
    block_size: int = 8,
    running: int = 8,
    budget: int = 64,
    overlap: bool = True,
    reuse: bool = True,
    backend: AttentionBackend = "auto",
) -> Engine:
    loaded, mesh = runner_parts(model, tp)
    config = EngineConfig(
        tp=tp,
        cache=CacheConfig(block_size=block_size, device_blocks=blocks, prefix_cache=reuse),
        sched=SchedConfig(max_running=running, token_budget=budget),
        runner=RunnerConfig(overlap=overlap, attention_backend=backend, token_buckets=(8, budget)),
    )
    runner = Runner(config, loaded.model, loaded.spec, loaded.name, mesh, SilentProgress())
    return Engine(config, runner.info, runner)


def conversations(vocab_size: int) -> dict[str, list[list[int]]]:
    """Users and what each says turn by turn; some begin alike, one is long."""
    rng = random.Random(7)
    system = [rng.randrange(3, vocab_size) for _ in range(17)]

    def words(count: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(count)]

    users = {f"user{i}": [system + words(1 + i % 3), *(words(3 + i) for _ in range(TURNS - 1))] for i in range(7)}
    users["long"] = [words(45), words(2), words(4)]
    return users


def play(engine: Engine, together: bool) -> dict[str, list[int]]:
    """All turns of all users; the history of a turn is everything said before. Returns each user's outputs in a row."""
    users = conversations(engine.info.vocab_size)
    history: dict[str, list[int]] = {name: [] for name in users}
    said: dict[str, list[int]] = {name: [] for name in users}
    for turn in range(TURNS):
        groups = [list(users)] if together else [[name] for name in users]
        for group in groups:
            for name in group:
                history[name] = history[name] + users[name][turn]
                sampling = SamplingParams(max_tokens=OUTPUT)
                engine.add(EngineRequest(request_id=name, token_ids=history[name], sampling=sampling))
            while engine.has_work:
                for output in engine.step():
                    history[output.request_id] = history[output.request_id] + output.token_ids
                    said[output.request_id] += output.token_ids
    return said


@functools.cache
def plain(model: str) -> dict[str, list[int]]:
    engine = make_engine(model, running=1, budget=128, overlap=False, reuse=False)
    said = play(engine, together=False)
    assert engine.stats().cached_tokens == 0
    assert all(len(tokens) == TURNS * OUTPUT for tokens in said.values())
    return said


CASES = {
    "continuous batching": {},
    "no overlap": {"overlap": False},
    "no prefix cache": {"reuse": False},
    "small chunks": {"budget": 9},
    "two at a time": {"running": 2},
    "preemption": {"block_size": 2, "blocks": 44},
    "blocks of one token": {"block_size": 1, "blocks": 1000},
    "large blocks": {"block_size": 32, "blocks": 20},
    "preemption, no overlap, no prefix cache": {"block_size": 2, "blocks": 44, "overlap": False, "reuse": False},
    "portable attention": {"backend": "xla"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_tokens_however_they_are_computed(case: str) -> None:
    expected = plain("llama2_gqa")
    engine = make_engine(**CASES[case])  # type: ignore[arg-type]
    assert play(engine, together=True) == expected
    stats = engine.stats()
    assert stats.held_blocks == 0
    assert stats.compiles_after_warmup == 0
    assert (stats.cached_tokens > 0) == CASES[case].get("reuse", True)
    assert (stats.preemptions > 0) == ("preemption" in case)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_two_devices_say_what_one_says() -> None:
    expected = plain("llama2_gqa")
    engine = make_engine(tp=2)
    assert len(engine.executor._k[0].sharding.device_set) == 2  # type: ignore[attr-defined]
    assert play(engine, together=True) == expected
    assert engine.stats().compiles_after_warmup == 0


@pytest.mark.parametrize("model", ["smollm2", "opt_350m"])
def test_other_families_hold_it_too(model: str) -> None:
    assert play(make_engine(model), together=True) == plain(model)


def test_aborted_batch_mates_do_not_change_what_the_others_say() -> None:
    engine = make_engine(blocks=40)
    users = conversations(engine.info.vocab_size)
    for name, turns in users.items():
        engine.add(EngineRequest(request_id=name, token_ids=turns[0], sampling=SamplingParams(max_tokens=OUTPUT)))
    said: dict[str, list[int]] = {name: [] for name in users}
    rng, steps = random.Random(1), 0
    while engine.has_work:
        steps += 1
        if steps in (1, 2, 4):
            engine.abort(f"user{rng.randrange(7)}")
        for output in engine.step():
            said[output.request_id] += output.token_ids
    for name, tokens in said.items():
        assert tokens == plain("llama2_gqa")[name][: len(tokens)]
    assert len(said["long"]) == OUTPUT
    assert engine.stats().held_blocks == 0


def test_a_stop_token_ends_the_text_at_the_same_place_with_and_without_overlap() -> None:
    prompt = conversations(make_engine().info.vocab_size)["long"][0]
    tokens = plain("llama2_gqa")["long"][:OUTPUT]
    stop = tokens[4]
    for overlap in (True, False):
        engine = make_engine(overlap=overlap)
        request = EngineRequest(
            request_id="a", token_ids=prompt, sampling=SamplingParams(max_tokens=OUTPUT), stop_token_ids=[stop]
        )
        engine.add(request)
        out = []
        while engine.has_work:
            out += engine.step()
        assert [t for o in out for t in o.token_ids] == tokens[: tokens.index(stop) + 1]
        assert out[-1].finish_reason == "stop"
