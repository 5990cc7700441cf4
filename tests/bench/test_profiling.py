"""`--profile`: one set of flags for engines and servers, and a trace of whatever has no engine."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp
import pytest

from bench import profiling
from jserve.cli import main as jserve
from jserve.config import RunnerConfig


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


def test_what_has_no_engine_is_traced_whole(tmp_path: Path) -> None:
    notes: list[str] = []
    with profiling.traced(argparse.Namespace(profile=None), notes.append):
        jnp.ones(8).sum().block_until_ready()
    assert notes == []
    with profiling.traced(argparse.Namespace(profile=tmp_path / "new"), notes.append):
        jnp.arange(1 << 16).sum().block_until_ready()
    assert "device: " in notes[0]
    assert list(tmp_path.glob("new/plugins/profile/*/perfetto_trace.json.gz"))
