"""The scheduler's benchmark drives the production scheduler, and says what it measured."""

from __future__ import annotations

import json

import pytest

from bench import scheduler


def test_it_reports_each_length_of_the_queue(capsys: pytest.CaptureFixture[str]) -> None:
    assert scheduler.main(["--running", "8", "--waiting", "20,40", "--steps", "30", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert {"step_us_8_20", "step_us_8_40", "churn_us_8_20", "churn_us_8_40", "others_cores"} <= metrics.keys()
    assert all(value >= 0 for value in metrics.values())


def test_churn_promotes_and_preempts() -> None:
    measured = scheduler.measure_churn(running=16, waiting=100, steps=200, seed=0)
    assert measured.promotions > 0
    assert measured.preemptions > 0
    assert measured.running > 8
