"""`jserve calibrate`: measured again each time, kept for the servers to come, and told in words and numbers."""

from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jserve import cli
from jserve.cache.cost import CostModel, DecodeCost, LinkCost, PrefillCost, break_even_tokens
from jserve.cache.disk_files import LocalFiles
from jserve.cache.disk_store import stored_models
from jserve.calibrate import GUESSED_DISK

MODEL = Path(__file__).parent / "fixtures" / "models" / "llama2_gqa"
SIZES = ["--max-running", "4", "--token-budget", "32", "--token-buckets", "8,32", "--device-blocks", "64"]
SIZES += ["--block-size", "4", "--max-model-len", "128"]
SIZES += ["--compile-cache-dir", os.environ["JAX_COMPILATION_CACHE_DIR"]]
COMMAND = ["calibrate", "--model", str(MODEL), *SIZES]


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Of calibrations alone: compiled programs stay where they are."""
    monkeypatch.setattr("jserve.calibrate.cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def kept(cache_folder: Path) -> list[Path]:
    return sorted((cache_folder / "calibration").glob("*.json"))


def test_it_is_measured_kept_and_told_as_json(
    cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*COMMAND, "--disk-dir", str(tmp_path / "disk"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (place,) = kept(cache_folder)
    cost = CostModel.from_dict(json.loads(place.read_text()))
    assert said.items() >= cost.to_dict().items()
    assert said["disk_measured"]
    assert GUESSED_DISK not in (cost.disk_read, cost.disk_write)
    assert (said["model"], said["block_tokens"]) == ("llama2_gqa", 4)
    assert {"break_even_host_tokens", "break_even_disk_tokens"} <= said.keys()
    (stored,) = stored_models(tmp_path / "disk")
    assert stored.num_blocks == 0, "what was written to measure is gone"


def test_it_measures_again_and_says_what_is_guessed(cache_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(COMMAND) == 0
    (place,) = kept(cache_folder)
    place.write_text("an old one")
    capsys.readouterr()
    assert cli.main(COMMAND) == 0
    assert CostModel.from_dict(json.loads(place.read_text())).disk_read == GUESSED_DISK
    said = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "GB/s" in said["host to device"]
    assert "a guess: --disk-dir has it measured" in said["disk read"]
    assert "tokens" in said["loading from host beats computing"]


def test_a_disk_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main([*COMMAND, "--disk-dir", str(tmp_path / "file")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "KV blocks cannot be kept in" in captured.err.splitlines()[-1]


def test_a_disk_that_fails_or_hangs_while_it_is_measured_is_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released = threading.Event()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hang(*_: object) -> None:
        threading.Timer(1.0, released.set).start()
        released.wait(20)
        raise FileNotFoundError

    command = [*COMMAND, "--load-timeout", "0.2", "--disk-dir", str(tmp_path / "disk")]
    for method, fault, said in (("write", full, "No space left on device"), ("read", hang, "longer than 0.2 s")):
        with monkeypatch.context() as patch:
            patch.setattr(LocalFiles, method, fault)
            assert cli.main([*command, "--json"]) == 0
        captured = capsys.readouterr()
        assert "the disk cannot be measured" in captured.err
        assert said in captured.err
        assert not json.loads(captured.out)["disk_measured"]


def model(**changes: Any) -> CostModel:
    """A token takes 1 ms to compute and has 1 kB; the link does 1 GB/s."""
    link = LinkCost(1e9)
    return replace(CostModel(PrefillCost(0.0, 1e-3, 0.0), DecodeCost(0.0), link, link, link, link, 8, 8000), **changes)


def test_loading_beats_computing_from_the_length_at_which_it_saves_its_fixed_part() -> None:
    assert break_even_tokens(model(), 1000, from_disk=False) == 8
    slow = LinkCost(0.9e6)  # 1.1 ms a token: never better than computing without attention
    assert break_even_tokens(model(host_to_device=slow), 1000, from_disk=False) is None
    assert break_even_tokens(model(disk_read=slow), 1000, from_disk=True) is None
    assert break_even_tokens(model(disk_read=slow), 1000, from_disk=False) == 8
    attention = PrefillCost(0.5, 1e-3, 1e-6)  # the 0.5 s are paid in either case
    late = break_even_tokens(model(prefill=attention, host_to_device=slow), 10_000, from_disk=False)
    assert late is not None
    assert late > 8
    assert late % 8 == 0
    for tokens, loads in ((late, True), (late - 8, False)):
        load_s = tokens / 900 + attention.seconds(1, tokens)
        assert (load_s < attention.seconds(tokens + 1)) == loads
