"""bench.tune finds a tile by measuring, and writes it to its own line of the table alone."""

from __future__ import annotations

import json

import pytest

from bench import tune
from bench.tune import with_entries
from jserve.pallas_kernels.tiles import TABLE, Key, Tile

SOURCE = tune.TABLE_FILE.read_text()
KEY = Key("hopper", "decode", 128, "16-bit")


def test_an_entry_is_replaced_and_no_other_line_changes() -> None:
    changed = with_entries(SOURCE, {KEY: Tile(16, 128, 8, 2)})
    before, after = SOURCE.splitlines(), changed.splitlines()
    (line,) = [new for old, new in zip(before, after, strict=True) if old != new]
    assert line == '    Key("hopper", "decode", 128, "16-bit"): Tile(16, 128, 8, 2),'


def test_every_entry_of_the_table_can_be_written() -> None:
    assert with_entries(SOURCE, TABLE) == SOURCE


def test_an_entry_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError, match="0 times"):
        with_entries(SOURCE, {KEY._replace(head_dim=512): Tile(16, 64, 4, 3)})


def test_candidates_are_sizes_that_triton_takes() -> None:
    for key in TABLE:
        for tile in tune.candidates_of(key, toy=False):
            assert tile.rows >= 16
            assert tile.kv_tokens >= 16


def test_a_toy_run_measures_interpreted_kernels_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--toy", "--kernel", "decode", "--head-dim", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (entry,) = found["config"]["entries"]
    assert entry["entry"] == ["ampere", "decode", 64, "16-bit"]
    assert entry["tried"] == 2
    assert entry["refused"] == 0
    assert entry["after_us"] <= entry["before_us"]


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no NVIDIA GPU" in line
