"""What happened to a request is told as it was, in bounded memory, for people and for trace viewers."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Literal

import pytest

from jserve.config import EngineConfig, SchedConfig
from jserve.doors import EngineInfo
from jserve.engine import Engine
from jserve.errors import InvalidRequest, NotFound, Overloaded
from jserve.explain import explained, listing, phases, save_trace, trace
from jserve.request import EngineRequest, SamplingParams, Terms
from jserve.sched.events import Event, EventKind
from jserve.simulated import SimulatedClock, SimulatedExecutor
from jserve.timeline import History, StepRecord, Timeline, Timelines

K = EventKind


def told(*events: tuple[float, Event], **limits: int) -> Timelines:
    timelines = Timelines(**limits)
    for time_s, event in events:
        timelines.record([event], time_s)
    return timelines


def life(name: str, start_s: float = 0.0) -> list[tuple[float, Event]]:
    """Arrives, runs, is done."""
    kinds = (K.ARRIVED, K.ADMITTED, K.FIRST_TOKEN, K.FINISHED)
    return [(start_s + i, Event(kind, name)) for i, kind in enumerate(kinds)]


PROMOTED = [
    (10.0, Event(K.ARRIVED, "late", detail="100 tokens")),
    (10.5, Event(K.PROMOTED, "late", by="head")),
    (10.5, Event(K.ADMITTED, "late", detail="0 of 100 tokens are cached")),
    (11.0, Event(K.FIRST_TOKEN, "late")),
    (13.0, Event(K.PREEMPTED, "late", by="head", detail="recompute, 7 blocks given back")),
    (17.0, Event(K.RESUMED, "late", detail="96 of 120 tokens are cached")),
    (20.0, Event(K.FINISHED, "late", detail="length")),
]


def test_the_story_of_a_request_that_was_promoted_preempted_and_resumed() -> None:
    text = explained(told(*PROMOTED).tell("late", now_s=25.0))
    assert text.splitlines() == [
        "request late, arrived 15.0 s ago",
        "   0.000 s  arrived             100 tokens",
        "   0.500 s  promoted past head",
        "   0.500 s  admitted            0 of 100 tokens are cached",
        "   1.000 s  first token",
        "   3.000 s  preempted for head  recompute, 7 blocks given back",
        "   7.000 s  resumed             96 of 120 tokens are cached",
        "  10.000 s  finished            length",
        "  in all: waiting 0.500 s, prefill 0.500 s, decode 5.000 s, preempted 4.000 s",
    ]


def test_the_phases_of_a_request_fill_its_life_without_gap_or_overlap() -> None:
    rng = random.Random(0)
    for _ in range(200):
        kinds = [K.ARRIVED, *rng.choices(list(K)[1:-2], k=rng.randrange(12))]
        times = sorted(rng.random() for _ in kinds)
        timeline = told(*((t, Event(kind, "a")) for t, kind in zip(times, kinds, strict=True))).tell("a", 2.0).timelines
        found = list(phases(timeline[0], now_s=2.0))
        assert found[0][1] == times[0]
        assert found[-1][2] == 2.0
        assert all(before[2] == after[1] and before[0] != after[0] for before, after in itertools.pairwise(found))


def test_a_rejected_request_is_remembered_with_its_reason() -> None:
    timelines = told((1.0, Event(K.REJECTED, "a", detail="predicted to take 9.1 s, and its deadline is 5 s")))
    assert "its deadline is 5 s" in explained(timelines.tell("a", 2.0))
    assert timelines.counts[K.REJECTED] == 1


def test_refused_requests_push_nobody_out_who_was_served() -> None:
    timelines = told(*life("served"), ended=4)
    for i in range(1000):
        timelines.record([Event(K.REJECTED, f"refused{i}")], 10.0)
    assert timelines.tell("served", 11.0).timelines[0].ended
    assert timelines.tell("refused999", 11.0).timelines[0].ended
    assert len(timelines.tell(None, 11.0).timelines) < 300


def test_requests_under_way_are_remembered_and_of_the_ended_ones_the_last() -> None:
    open_ = [(0.0, Event(K.ARRIVED, f"open{i}")) for i in range(50)]
    ended = [event for i in range(30) for event in life(f"ended{i}", float(i))]
    timelines = told(*open_, *ended, ended=10)
    names = {timeline.request_id for timeline in timelines.tell(None, 99.0).timelines}
    assert names == {f"open{i}" for i in range(50)} | {f"ended{i}" for i in range(20, 30)}
    with pytest.raises(NotFound, match="'ended19' is not remembered"):
        timelines.tell("ended19", 99.0)
    assert timelines.counts[K.FINISHED] == 30


def test_of_one_request_the_beginning_and_the_end_are_kept() -> None:
    shuffled = [(float(i), Event(K.PREEMPTED if i % 2 else K.RESUMED, "a")) for i in range(1, 500)]
    timelines = told((0.0, Event(K.ARRIVED, "a")), *shuffled, (999.0, Event(K.FINISHED, "a")), events=10)
    (timeline,) = timelines.tell("a", 1000.0).timelines
    assert (len(timeline.moments), timeline.forgotten) == (10, 491)
    assert (timeline.moments[0].kind, timeline.moments[-1].kind) == (K.ARRIVED, K.FINISHED)
    assert "491 events are forgotten" in explained(timelines.tell("a", 1000.0))


def test_a_name_that_is_used_again_means_the_later_request() -> None:
    timelines = told(*life("a"), *life("a", start_s=100.0))
    (timeline,) = timelines.tell("a", 200.0).timelines
    assert [moment.time_s for moment in timeline.moments] == [100.0, 101.0, 102.0, 103.0]


def test_continuations_are_found_by_the_name_of_their_call() -> None:
    timelines = told(*life("a/0"), *life("b"), *life("a/1", 1.0))
    assert [timeline.request_id for timeline in timelines.tell("a", 9.0).timelines] == ["a/0", "a/1"]
    assert [timeline.request_id for timeline in timelines.tell("a/1", 9.0).timelines] == ["a/1"]


def step(launched_s: float) -> StepRecord:
    return StepRecord(launched_s, launched_s + 0.9, 20, 3, 2, 3, 1, 40, 1e-4, 1e-4, 1e-4)


def test_a_request_comes_with_the_steps_of_its_time() -> None:
    timelines = told(*life("a", start_s=10.0))
    timelines.steps.extend(step(float(second)) for second in range(30))
    assert [s.launched_s for s in timelines.tell("a", 99.0).steps] == [10.0, 11.0, 12.0, 13.0]


def test_the_list_has_a_line_for_each_request_in_order_of_arrival() -> None:
    timelines = told((0.0, Event(K.ARRIVED, "head")), *PROMOTED)
    lines = listing(timelines.tell(None, 30.0)).splitlines()
    assert [line.split()[0] for line in lines] == ["request", "head", "late"]
    assert lines[2].split() == ["late", "20.0", "s", "ago", "finished", "length", "7"]


def test_the_trace_has_a_track_for_each_request_and_one_for_the_steps(tmp_path: Path) -> None:
    timelines = told(*life("head", 9.0), *PROMOTED)
    timelines.steps.extend([step(10.0), step(10.5)])  # they overlap
    save_trace(timelines.tell(None, 30.0), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(tracks.values()) == ["head", "late", "steps"]
    late = next(place for place, name in tracks.items() if name == "late")
    slices = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == late]
    assert [e["name"] for e in slices] == ["waiting", "prefill", "decode", "preempted", "decode"]
    assert [(e["ts"], e["dur"]) for e in slices][3] == (13e6, 4e6)
    marks = [e["name"] for e in events if e["ph"] == "i" and (e["pid"], e["tid"]) == late]
    assert "promoted past head" in marks
    assert "preempted for head" in marks
    begun = {e["id"] for e in events if e["ph"] == "b"}
    assert begun == {e["id"] for e in events if e["ph"] == "e"}
    assert len(begun) == 2
    assert {e["name"] for e in events if e["ph"] == "C"} == {"running", "waiting", "free_blocks"}


def test_a_trace_of_nothing_is_a_trace() -> None:
    assert {e["ph"] for e in trace(History(0.0, [], []))["traceEvents"]} == {"M"}
    assert listing(History(0.0, [], [])).split() == ["request", "arrived", "now", "events"]


# --- from the engine --------------------------------------------------------------------------------------------------


def make_engine(blocks: int = 64, block_size: int = 4, admission: Literal["queue", "predict"] = "queue") -> Engine:
    clock = SimulatedClock()
    info = EngineInfo("simulated", "simulated", 97, 1000, block_size, blocks, 64, "none", "simulated", 0, 0)
    config = EngineConfig(sched=SchedConfig(max_running=8, token_budget=64, admission=admission))
    return Engine(config, info, SimulatedExecutor(clock, blocks, block_size, 97), clock)


def request(name: str, prompt: list[int], max_tokens: int) -> EngineRequest:
    return EngineRequest(request_id=name, token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))


def run(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("it never ends")


def kinds_of(timeline: Timeline) -> list[str]:
    return [moment.kind for moment in timeline.moments]


def test_the_engine_remembers_what_its_scheduler_tells() -> None:
    """Two requests in a pool for one: the younger gives way, and comes back when the older has ended."""
    engine = make_engine(blocks=6, block_size=4)
    for name in "ab":
        engine.add(request(name, [ord(name) % 97] * 8, 16))
    run(engine)
    (a,) = engine.history("a").timelines
    (b,) = engine.history("b").timelines
    assert kinds_of(a) == [K.ARRIVED, K.ADMITTED, K.FIRST_TOKEN, K.FINISHED]
    assert kinds_of(b) == [K.ARRIVED, K.ADMITTED, K.FIRST_TOKEN, K.PREEMPTED, K.RESUMED, K.FINISHED]
    assert b.moments[3].by == "a"
    assert b.moments[4].time_s >= a.moments[-1].time_s > b.moments[3].time_s
    steps = engine.history("b").steps
    assert sum(s.num_tokens for s in steps) >= 2 * (8 + 15)
    assert all(s.launched_s <= s.committed_s and s.num_decodes <= s.num_rows for s in steps)
    assert engine.stats().preemptions == engine.timelines.counts[K.PREEMPTED] == 1


def test_a_refused_request_is_explained_and_leaves_its_namesake_alone() -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest):
        engine.add(request("bad", [], 4))
    (bad,) = engine.history("bad").timelines
    assert kinds_of(bad) == [K.REJECTED]
    assert "no tokens" in bad.moments[0].detail
    engine.add(request("a", [1], 4))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add(request("a", [1], 4))
    engine.abort("a")
    (a,) = engine.history("a").timelines
    assert kinds_of(a) == [K.ARRIVED, K.FINISHED]
    assert a.moments[-1].detail == "abort"


def test_a_request_that_overtakes_yields_and_comes_back_tells_exactly_that() -> None:
    """`head` does not fit beside `first`; `late` does, and runs until `head` can."""
    engine = make_engine(blocks=16)
    engine.add(request("first", [1] * 32, 12))
    engine.step()
    engine.add(request("head", [2] * 52, 8))
    engine.add(request("late", [3] * 8, 40))
    run(engine)
    first, head, late = (engine.history(name).timelines[0] for name in ("first", "head", "late"))
    assert kinds_of(head) == [K.ARRIVED, K.ADMITTED, K.FIRST_TOKEN, K.FINISHED]
    assert kinds_of(late) == [
        *(K.ARRIVED, K.PROMOTED, K.ADMITTED, K.FIRST_TOKEN),
        *(K.PREEMPTED, K.RESUMED, K.FINISHED),
    ]
    told = {moment.kind: moment for moment in late.moments}
    assert told[K.PROMOTED].by == told[K.PREEMPTED].by == "head"
    admitted, ended = head.moments[1].time_s, head.moments[-1].time_s
    assert first.moments[-1].time_s <= admitted == told[K.PREEMPTED].time_s < ended <= told[K.RESUMED].time_s
    story = explained(engine.history("late"))
    assert "promoted past head" in story
    assert "preempted for head" in story
    assert story.splitlines()[-1].startswith("  in all: waiting 0.000 s, prefill")


def test_a_request_that_would_be_late_is_rejected_with_its_prediction() -> None:
    engine = make_engine(blocks=400, admission="predict")
    engine.add(request("before", [1] * 900, 20))
    for _ in range(5):  # until it is known what a prompt takes
        engine.step()
    late = request("late", [2] * 900, 4)
    late.terms = Terms(slo_ttft_s=0.01)
    with pytest.raises(Overloaded):
        engine.add(late)
    story = explained(engine.history("late"))
    assert "rejected" in story
    assert "is predicted in 0." in story
    assert "due in 0.01 s" in story
