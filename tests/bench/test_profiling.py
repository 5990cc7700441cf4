"""`--profile`: one set of flags for engines and servers, and a trace of whatever has no engine."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bench import profiling
from bench.recompute_vs_swap import real_crowds
from bench.recompute_vs_swap.__main__ import main as recompute_vs_swap
from bench.recompute_vs_swap.poster import cost_model, model_named
from bench.recompute_vs_swap.simulation import Request
from bench.recompute_vs_swap.turns import WAYS
from jserve import checkpoints
from jserve.cli import main as jserve
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.profiler import read_phases
from jserve.progress import SilentProgress
from jserve.runner import Runner, make_mesh

MODEL = Path(__file__).parents[1] / "fixtures" / "models" / "llama2_gqa"


def parsed(*flags: str, skip: int = 64) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    profiling.add_argument(parser, skip=skip)
    return parser.parse_args(flags)


def test_the_window_is_the_runners_own() -> None:
    assert RunnerConfig(**profiling.of(parsed())) == RunnerConfig()
    chosen = profiling.of(parsed("--profile", "there", "--profile-steps", "8", skip=500))
    assert RunnerConfig(**chosen) == RunnerConfig(profile_dir=Path("there"), profile_skip=500, profile_steps=8)


def test_a_server_is_told_the_same_and_knows_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert profiling.flags_of(parsed()) == []
    flags = profiling.flags_of(parsed("--profile", "there", "--profile-skip", "3"))
    assert flags == ["--profile-dir", "there", "--profile-skip", "3", "--profile-steps", "64"]
    with pytest.raises(SystemExit):
        jserve(["serve", "--help"])
    assert {flag for flag in flags if flag.startswith("--")} <= set(capsys.readouterr().out.split())


def test_one_runner_is_looked_at_for_each_of_its_engines_apart(tmp_path: Path) -> None:
    notes: list[str] = []
    mesh = make_mesh(1)
    loaded = checkpoints.load(MODEL, mesh=mesh, dtype=np.float32)
    config = EngineConfig(
        cache=CacheConfig(block_size=8, device_blocks=24, host_gib=1.0),
        sched=SchedConfig(max_running=4, token_budget=32),
        runner=RunnerConfig(token_buckets=(32,), warmup=False),
    )
    runner = Runner(config, loaded.model, loaded.spec, loaded.name, mesh, SilentProgress())
    cost = cost_model(model_named("llama-2-7b"), 8)
    crowd = real_crowds.Point("", [Request(40, 24)] * 4, kv_tokens=20 * 8)
    window = profiling.of(parsed("--profile", str(tmp_path), "--profile-steps", "1000", skip=2))
    for way in WAYS:
        with profiling.steps(runner, window, way, notes.append):
            assert real_crowds.play_once(runner, cost, crowd, way, seed=0).preemptions
    assert runner.profile is None
    runner.close()
    assert len(notes) == len(WAYS)
    phases = {way: {phase.name for phase in read_phases(tmp_path / way)} for way in WAYS}
    assert all(found >= {"schedule", "stage", "forward", "sample", "wait", "commit"} for found in phases.values())
    assert [way for way in WAYS if "load" in phases[way]] == ["swap", "auto"]
    assert all(list(tmp_path.glob(f"{way}/plugins/profile/*/perfetto_trace.json.gz")) for way in WAYS)


def test_what_has_no_engine_is_traced_whole(tmp_path: Path) -> None:
    notes: list[str] = []
    with profiling.traced(argparse.Namespace(profile=None), notes.append):
        jnp.ones(8).sum().block_until_ready()
    assert notes == []
    with profiling.traced(argparse.Namespace(profile=tmp_path / "new"), notes.append):
        jnp.arange(1 << 16).sum().block_until_ready()
    assert "device: " in notes[0]
    assert list(tmp_path.glob("new/plugins/profile/*/perfetto_trace.json.gz"))


def test_what_is_simulated_has_no_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recompute_vs_swap(["--sim", "--profile", str(tmp_path)])
    assert "leave --sim out" in capsys.readouterr().err
