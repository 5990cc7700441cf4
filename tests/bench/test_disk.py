"""The disk benchmark measures each system on real files, and leaves none."""

from __future__ import annotations

from pathlib import Path

from bench.disk import SYSTEMS, measure


def test_every_system_writes_and_reads_in_every_turn(tmp_path: Path) -> None:
    rates, _ = measure(tmp_path, 8192, 12, turns=2)
    assert set(rates) == set(SYSTEMS)
    for system in rates.values():
        assert len(system.write) == len(system.read) == 2
        assert min(system.write + system.read) > 0
    assert list(tmp_path.iterdir()) == []
