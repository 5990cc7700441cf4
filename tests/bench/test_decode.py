"""bench.decode: what it claims of several batch sizes is the worst of them."""

from __future__ import annotations

import json

import pytest

from bench import decode
from bench.decode import Measured, metrics_of


def test_claims_are_the_worst_batch_and_idle_is_never_negative() -> None:
    found = [
        Measured(1, step_s=0.010, least_s=0.008, device_s=0.0099, host_s=0.001),
        Measured(64, step_s=0.020, least_s=0.010, device_s=0.021, host_s=0.001),
    ]
    metrics = metrics_of(found)
    assert metrics["decode_step_over_floor"] == pytest.approx(2.0)
    assert metrics["idle_share"] == pytest.approx(0.01)
    assert metrics["tokens_per_s_64"] == pytest.approx(3200)
    assert found[1].idle_share == 0
    assert "idle_share" not in metrics_of([])


def test_a_small_shape_is_measured_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--shape",
        "tiny",
        "--batch",
        "2",
        "--context",
        "16",
        "--steps",
        "3",
        "--device-blocks",
        "64",
        "--json",
    ]
    assert decode.main(arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["metrics"]["compiles_after_warmup"] == 0
    assert {"step_ms_2", "device_step_ms_2", "decode_step_over_floor", "idle_share"} <= set(found["metrics"])
    assert found["config"]["copy_bytes_per_s"] > 0
