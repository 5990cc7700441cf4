"""The scheduler tells what happens to each request, in order, without a clock."""

from __future__ import annotations

import pytest
from simulation import make_engine, make_tiered_engine, play, request, workload

from jserve.engine import Engine
from jserve.sched.events import MAX_EVENTS
from jserve.timeline import Moment


def moments_of(engine: Engine, name: str) -> list[Moment]:
    (timeline,) = engine.timelines.tell(name, 0.0).timelines
    return timeline.moments


def test_a_life_without_trouble() -> None:
    engine = make_engine()
    engine.add(request("a", [1, 2, 3], 3))
    while engine.has_work:
        engine.step()
    moments = moments_of(engine, "a")
    assert [m.kind for m in moments] == ["arrived", "admitted", "first_token", "finished"]
    assert moments[-1].detail == "length"


def test_a_preempted_request_says_for_whom_and_resumes() -> None:
    engine = make_engine(blocks=8, budget=32)
    for name in "ab":
        engine.add(request(name, [1, 2, 3, 4], 24))
    while engine.has_work:
        engine.step()
    of_b = moments_of(engine, "b")
    kinds = [e.kind for e in of_b]
    assert kinds[:4] == ["arrived", "admitted", "first_token", "preempted"]
    assert "resumed" in kinds
    assert kinds[-1] == "finished"
    assert of_b[3].by == "a"


def test_an_abort_is_an_end_like_others() -> None:
    engine = make_engine()
    engine.add(request("a", [1, 2, 3], 30))
    engine.step()
    engine.abort("a")
    engine.step()
    last = moments_of(engine, "a")[-1]
    assert (last.kind, last.detail) == ("finished", "abort")


def test_every_request_arrives_once_ends_once_and_resumes_as_often_as_it_is_preempted() -> None:
    arrivals = workload(seed=3, requests=12, most_tokens=50)
    run = play(make_engine(blocks=16, budget=24), arrivals)
    assert run.preemptions > 0
    for name in (a.request.request_id for a in arrivals):
        kinds = [kind for kind, who, _ in run.events if who == name]
        assert kinds[0] == "arrived"
        assert kinds[-1] == "finished"
        assert kinds.count("admitted") == kinds.count("first_token") == kinds.count("finished") == 1
        assert kinds.count("resumed") == kinds.count("preempted")


def run(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("it never ends")


@pytest.mark.parametrize("orders_loads", [False, True])
def test_what_comes_from_the_host_is_told_while_it_waits_and_when_it_is_loaded(orders_loads: bool) -> None:
    engine = make_tiered_engine(blocks=16, copy_s=0.001, orders_loads=orders_loads)
    history = list(range(33))
    engine.add(request("before", history, 2))
    run(engine)
    engine.cache.pool.release(engine.cache.pool.allocate(12) or [])  # what is free goes first, and four blocks remain
    engine.add(request("a", [*history, 5, 6], 2))
    run(engine)
    moments = {m.kind: m.detail for m in moments_of(engine, "a")}
    assert moments["arrived"] == "35 tokens: 16 on the device, 16 on the host"
    assert moments["admitted"] == "32 of 35 tokens are cached: 16 on the device, 16 on the host"
    assert moments["loading"] == "16 tokens from the host" + (", before this step" if orders_loads else "")
    assert moments["loaded"] == "32 tokens have their KV"


def test_what_comes_from_disk_is_told_too() -> None:
    engine = make_tiered_engine(blocks=12, host=12, disk=100, copy_s=0.001)
    history = list(range(33))
    for prompt in (history, [50] * 40, [51] * 40):
        engine.add(request(f"before{prompt[0]}", prompt, 2))
        run(engine)
    engine.add(request("a", [*history, 5, 6], 2))
    run(engine)
    moments = {m.kind: m.detail for m in moments_of(engine, "a")}
    assert moments["arrived"] == "35 tokens: 32 on disk"
    assert moments["staging"] == "8 blocks from disk"
    assert moments["admitted"] == "32 of 35 tokens are cached: 32 on disk"
    assert moments["loading"] == "32 tokens from the host"


def test_nobody_reads_and_memory_stays_bounded() -> None:
    engine = make_engine()
    scheduler = engine.scheduler
    for i in range(MAX_EVENTS):
        engine.add(request(str(i), [1], 1, cache_salt=""))
        engine.abort(str(i))  # without a step nobody takes the events out
    assert len(scheduler.events) <= 2 * MAX_EVENTS
