"""Each order, as the requests see it. Whoever ranks behind yields, whatever the order."""

from __future__ import annotations

import pytest
from simulation import events_of, make_engine, request

from jserve.engine import Engine
from jserve.errors import ConfigError
from jserve.request import Terms
from jserve.sched.order import AGING, Arrival, by_prefix, by_slack, order_named
from jserve.sched.victim import victim_named


def ended(engine: Engine) -> list[str]:
    for _ in range(10_000):
        if not engine.has_work:
            return [e.request_id for e in events_of(engine) if e.kind == "finished"]
        engine.step()
    raise AssertionError("it never ends")


def test_the_highest_priority_starts_first_and_takes_what_it_needs() -> None:
    engine = make_engine(blocks=20, block_size=4, budget=64, max_running=2, order="priority")
    for name, priority in (("low", -1), ("normal", 0), ("high", 7), ("higher", 8)):
        engine.add(request(name, [1, 2, 3], 20, terms=Terms(priority=priority)))
        engine.step()
    assert set((order := ended(engine))[:2]) == {"high", "higher"}
    assert order[2:] == ["normal", "low"]
    assert engine.stats().preemptions > 0


def test_whoever_has_to_start_soonest_does() -> None:
    assert by_slack(Arrival(1, arrival_s=0.0, slo_ttft_s=5.0)) > by_slack(Arrival(2, arrival_s=1.0, slo_ttft_s=2.0))
    assert by_slack(Arrival(1, slo_ttft_s=2.0, prefill_s=0.1)) > by_slack(Arrival(2, slo_ttft_s=2.0, prefill_s=1.0))
    engine = make_engine(budget=64, max_running=1, order="slo")
    for name, slo_s in (("first", 50.0), ("patient", 40.0), ("urgent", 10.0), ("default", None)):
        engine.add(request(name, [1, 2, 3], 5, terms=Terms(slo_ttft_s=slo_s)))
    assert ended(engine) == ["default", "urgent", "patient", "first"]


def test_a_long_kept_prefix_comes_first_but_not_before_everybody() -> None:
    assert by_prefix(Arrival(10, cached_blocks=3)) == 7
    assert by_prefix(Arrival(100, cached_blocks=10_000)) == 100 - AGING
    engine = make_engine(blocks=200, budget=64, max_running=1, reuse=True, order="prefix")
    history = list(range(60))
    engine.add(request("turn1", history, 4))
    ended(engine)
    engine.add(request("running", [1] * 8, 4))
    engine.step()
    for i in range(3):
        engine.add(request(f"new{i}", [90 + i] * 60, 4))
    engine.add(request("turn2", [*history, 5, 6], 4))
    assert ended(engine)[1:] == ["turn2", "running", "new0", "new1", "new2"]


@pytest.mark.parametrize(("named", "what"), [(order_named, "order 'random'"), (victim_named, "victim policy 'random'")])
def test_unknown_names_are_refused(named: object, what: str) -> None:
    assert callable(named)
    with pytest.raises(ConfigError, match=f"there is no {what}: use one of"):
        named("random")
