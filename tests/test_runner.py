"""The runner at start-up: what it cannot do is said before anything is served."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jserve import checkpoints
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.errors import ConfigError
from jserve.progress import SilentProgress
from jserve.runner import Runner, make_mesh

MODEL = Path(__file__).parent / "fixtures" / "models" / "llama2_gqa"
SMALL = EngineConfig(
    cache=CacheConfig(block_size=8, device_blocks=32),
    sched=SchedConfig(max_running=4, token_budget=16),
    runner=RunnerConfig(token_buckets=(4, 16)),
)


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines += text.splitlines()


def start(config: EngineConfig, notes: Notes | None = None) -> Runner:
    mesh = make_mesh(1)
    loaded = checkpoints.load(MODEL, mesh=mesh, dtype=np.float32)
    return Runner(config, loaded.model, loaded.spec, loaded.name, mesh, notes or Notes())


def test_warm_up_tells_of_each_program_and_its_compile_time() -> None:
    notes = Notes()
    runner = start(SMALL, notes)
    names = [line.split()[0] for line in notes.lines[2:-1]]
    assert names == ["set_slot", "set_counts", "head[1]", "head[4]", "forward[4]", "forward[16]"]
    assert notes.lines[0].startswith("attention backend:")
    assert notes.lines[-1].startswith("6 programs")
    assert runner.compiles_after_warmup == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 257}, "max_model_len is 257, above the model's 256"),
        ({"runner": RunnerConfig(token_buckets=(4, 8))}, "ends at 8, below the token budget of 16"),
        ({"runner": RunnerConfig(token_buckets=(16, 4))}, "in rising order"),
        ({"runner": RunnerConfig(attention_backend="pallas")}, "needs an NVIDIA GPU"),
        ({"cache": CacheConfig(block_size=8, device_blocks=10**9)}, r"takes 1907\.3 GiB, too much here"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start(dataclasses.replace(SMALL, **change))  # type: ignore[arg-type]


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="tp is 99, but this machine has"):
        make_mesh(99)


def test_without_a_number_the_pool_is_sized_and_holds_at_most_what_can_be_used() -> None:
    runner = start(dataclasses.replace(SMALL, cache=CacheConfig(block_size=8)))
    assert runner.info.device_blocks == 4 * 256 // 8  # every slot at full length: more would never be used
