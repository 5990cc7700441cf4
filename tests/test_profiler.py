"""A profile of some steps of the real engine: what was asked for, by phase and by program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jserve import checkpoints
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.engine import Engine
from jserve.errors import ConfigError
from jserve.profiler import PHASES, read_phases, table
from jserve.progress import SilentProgress
from jserve.request import EngineRequest, SamplingParams
from jserve.runner import Runner, make_mesh

MODEL = Path(__file__).parent / "fixtures" / "models" / "llama2_gqa"


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def serve(directory: Path, *, skip: int, steps: int, tokens: int) -> list[str]:
    """Decode so many tokens; what the engine has noted."""
    config = EngineConfig(
        cache=CacheConfig(block_size=8, device_blocks=32),
        sched=SchedConfig(max_running=2, token_budget=16),
        runner=RunnerConfig(
            token_buckets=(16,), profile_dir=directory, profile_skip=skip, profile_steps=steps, warmup=False
        ),
    )
    mesh, notes = make_mesh(1), Notes()
    loaded = checkpoints.load(MODEL, mesh=mesh, dtype=np.float32)
    runner = Runner(config, loaded.model, loaded.spec, loaded.name, mesh, notes)
    engine = Engine(config, runner.info, runner)
    engine.add(EngineRequest(request_id="a", token_ids=[5, 6, 7], sampling=SamplingParams(max_tokens=tokens)))
    while engine.has_work:
        engine.step()
    engine.close()
    return notes.notes


def test_a_profile_of_some_steps_tells_every_phase_and_the_devices_programs(tmp_path: Path) -> None:
    notes = serve(tmp_path, skip=3, steps=5, tokens=16)
    assert list(tmp_path.glob("plugins/profile/*/perfetto_trace.json.gz"))
    phases = {phase.name: phase for phase in read_phases(tmp_path)}
    assert {name: phases[name].calls for name in ("forward", "sample")} == {"forward": 5, "sample": 5}
    assert set(phases) >= set(PHASES) - {"load"}, "there is no host to load from"
    assert all(phase.total_s > 0 for phase in phases.values())
    assert any("forward" in name for name in phases if name.startswith("device: "))
    assert "profile of 5 steps" in notes[-1]
    assert "ms a step" in notes[-1]


def test_a_window_that_is_not_whole_when_the_engine_closes_is_written_all_the_same(tmp_path: Path) -> None:
    assert "profile of 6 steps" in serve(tmp_path, skip=2, steps=100, tokens=8)[-1]


def test_no_profile_is_an_error_that_says_why(tmp_path: Path) -> None:
    notes = serve(tmp_path / "none", skip=100, steps=1, tokens=2)
    assert notes[-1].startswith(f"no profile in {tmp_path / 'none'}: all ")
    assert notes[-1].endswith("came before its window: skip fewer than 100")
    with pytest.raises(ConfigError, match="its window of steps was never reached"):
        read_phases(tmp_path / "none")


def test_a_profile_cannot_go_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write a profile"):
        serve(tmp_path / "file" / "profile", skip=0, steps=1, tokens=1)


def test_the_table_is_for_people(tmp_path: Path) -> None:
    serve(tmp_path, skip=0, steps=2, tokens=4)
    assert table(read_phases(tmp_path)).startswith("phase")
