"""A server that is killed in the middle of disk writes leaves nothing from which another would say a wrong token."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_tiers import chat, make_engine, tiers_of

from jserve.cache.disk_store import DiskStore, Outcome

CRASHER = Path(__file__).parent / "cache" / "disk_crasher.py"
KILLS = 100
KEY_BYTES = 16
LARGE_BYTES = 1 << 20


@pytest.fixture(autouse=True)
def own_calibrations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("jserve.calibrate.cache_root", lambda: tmp_path / "cache")


def read_all(directory: Path, fingerprint: str, block_bytes: int) -> dict[bytes, bytes]:
    """Every block that can be read, by key. None may be damaged, for kills tear no file that has its name."""
    store = DiskStore.open(directory, fingerprint, block_bytes)
    try:
        buffers = {block.key: bytearray(block_bytes) for block in store.index()}
        for ticket, (key, buffer) in enumerate(buffers.items()):
            store.read(ticket, key, buffer)
        deadline, ended = time.monotonic() + 30, []
        while len(ended) < len(buffers):
            assert time.monotonic() < deadline
            ended += store.poll()
            time.sleep(0.001)
        assert {end.outcome for end in ended} == {Outcome.OK}
        return {key: bytes(buffer) for key, buffer in buffers.items()}
    finally:
        store.close()


def rows_of(blocks: dict[bytes, bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(key + contents for key, contents in blocks.items()), np.uint8).reshape(
        len(blocks), -1
    )


def test_killed_a_hundred_times_in_the_middle_of_writes_the_directory_serves_the_same_tokens(tmp_path: Path) -> None:
    before = make_engine(device=400, host=400, directory=tmp_path / "whole")
    told = chat(before)
    before.close()
    fingerprint, block_bytes = before.info.fingerprint, before.executor.block_bytes  # type: ignore[attr-defined]
    kv = read_all(tmp_path / "whole", fingerprint, block_bytes)
    rng = random.Random(7)
    large = {rng.randbytes(KEY_BYTES): rng.randbytes(LARGE_BYTES) for _ in range(8)}
    np.save(tmp_path / "kv.npy", rows_of(kv))
    np.save(tmp_path / "large.npy", rows_of(large))

    crashed = tmp_path / "crashed"
    models = [fingerprint, str(tmp_path / "kv.npy"), "large", str(tmp_path / "large.npy")]
    command = [sys.executable, str(CRASHER), str(crashed), str(KILLS), "1", *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > KILLS // 4, "the kills came between the writes"

    assert read_all(crashed, "large", LARGE_BYTES).items() <= large.items()
    found = read_all(crashed, fingerprint, block_bytes)
    assert found.items() <= kv.items()
    assert len(found) > len(kv) // 4
    after = make_engine(device=400, host=400, directory=crashed)
    assert chat(after) == told
    assert tiers_of(after).tier_stats.disk_hit_tokens > 0
    assert tiers_of(after).tier_stats.failed_reads == 0
    after.close()
