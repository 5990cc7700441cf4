"""A request's timeline for people (`story`) and for viewers (`trace`, which Perfetto and chrome://tracing open)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from jserve.sched.events import EventKind
from jserve.timeline import History, Moment, StepRecord, Timeline

_SAID: Mapping[str, str] = {
    EventKind.PROMOTED: "promoted past {by}",
    EventKind.PREEMPTED: "preempted for {by}",
}
_STARTS: Mapping[str, str] = {
    EventKind.ARRIVED: "waiting",
    EventKind.STAGING: "waiting",
    EventKind.DEFERRED: "waiting",
    EventKind.ADMITTED: "prefill",
    EventKind.LOADING: "loading",
    EventKind.LOADED: "prefill",
    EventKind.PREEMPTED: "preempted",
    EventKind.RESUMED: "running",
    EventKind.FIRST_TOKEN: "decode",
}
"""What a request does from an event on."""
_ENDS = (EventKind.FINISHED, EventKind.REJECTED)
_REQUESTS, _STEPS = 1, 2
"""Process ids of the trace: Perfetto groups tracks by them."""


# --- text -------------------------------------------------------------------------------------------------------------


def explained(history: History) -> str:
    """The story of each request."""
    return "\n\n".join(story(timeline, history.now_s) for timeline in history.timelines)


def story(timeline: Timeline, now_s: float) -> str:
    """What happened to a request, a line each, in seconds since its arrival; then where its time went."""
    begin_s = timeline.moments[0].time_s
    rows = [
        (f"{moment.time_s - begin_s:.3f}", _said(moment, timeline.request_id), moment.detail)
        for moment in timeline.moments
    ]
    if timeline.forgotten:
        half = (len(rows) + 1) // 2
        rows.insert(half, ("...", f"{timeline.forgotten} events are forgotten", ""))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"request {timeline.request_id}, arrived {now_s - begin_s:.1f} s ago"]
    lines += [f"  {time:>{widths[0]}} s  {said:<{widths[1]}}  {detail}".rstrip() for time, said, detail in rows]
    lines.append(f"  {_sum_up(timeline, now_s)}")
    return "\n".join(lines)


def _said(moment: Moment, request_id: str) -> str:
    if moment.by is None:
        return moment.kind.replace("_", " ")
    if moment.by == request_id:  # of all that hold blocks, the youngest was the one that lacked some
        return f"{moment.kind} for lack of room"
    return _SAID.get(moment.kind, f"{moment.kind.replace('_', ' ')} by {{by}}").format(by=moment.by)


def _sum_up(timeline: Timeline, now_s: float) -> str:
    spent: dict[str, float] = {}
    for name, begin_s, end_s in phases(timeline, now_s):
        spent[name] = spent.get(name, 0.0) + end_s - begin_s
    said = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in spent.items())
    return f"in all: {said}" if spent else "it never joined the queue"


def phases(timeline: Timeline, now_s: float) -> Iterator[tuple[str, float, float]]:
    """What the request did, from when until when: waiting, loading, prefill, decode, preempted."""
    name, begin_s = None, 0.0
    had_token = False
    for moment in timeline.moments:
        had_token |= moment.kind == EventKind.FIRST_TOKEN
        following = _STARTS.get(moment.kind)
        if following in ("prefill", "running"):
            following = "decode" if had_token else "prefill"
        if (following is None and moment.kind not in _ENDS) or following == name:
            continue
        if name is not None:
            yield name, begin_s, moment.time_s
        name, begin_s = following, moment.time_s
    if name is not None:
        yield name, begin_s, now_s


def listing(history: History) -> str:
    """A line for each request, the latest last."""
    rows = [("request", "arrived", "now", "events")]
    for timeline in history.timelines:
        last = timeline.moments[-1]
        told = (
            f"{last.kind.replace('_', ' ')} {last.detail}".rstrip()
            if timeline.ended
            else _said(last, timeline.request_id)
        )
        ago = f"{history.now_s - timeline.moments[0].time_s:.1f} s ago"
        rows.append((timeline.request_id, ago, told, str(len(timeline.moments) + timeline.forgotten)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_json(history: History) -> str:
    """One line, by the names of `jserve.timeline`."""
    return msgspec.json.encode(history).decode()


# --- trace ------------------------------------------------------------------------------------------------------------


def trace(history: History) -> dict[str, Any]:
    """In the Trace Event Format (JSON object): a track for each request, one for the steps, and counters.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, which Perfetto reads. Times are
    microseconds on the engine's clock.
    """
    events = [*_named(_REQUESTS, "requests"), *_named(_STEPS, "engine")]
    for track, timeline in enumerate(history.timelines, start=1):
        events += _request_track(track, timeline, history.now_s)
    events += _step_track(history.steps)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def save_trace(history: History, path: str | Path) -> None:
    """As a file. OSError if it cannot be written."""
    Path(path).write_text(json.dumps(trace(history)) + "\n", encoding="utf-8")


def _request_track(track: int, timeline: Timeline, now_s: float) -> Iterator[dict[str, Any]]:
    place = {"pid": _REQUESTS, "tid": track}
    yield _named(_REQUESTS, timeline.request_id, track)[0]
    for name, begin_s, end_s in phases(timeline, now_s):
        yield {"ph": "X", "name": name, "ts": begin_s * 1e6, "dur": (end_s - begin_s) * 1e6, **place}
    for moment in timeline.moments:
        args = {key: value for key, value in (("by", moment.by), ("detail", moment.detail)) if value}
        yield {
            "ph": "i",
            "s": "t",
            "name": _said(moment, timeline.request_id),
            "ts": moment.time_s * 1e6,
            "args": args,
            **place,
        }


def _step_track(steps: Iterable[StepRecord]) -> Iterator[dict[str, Any]]:
    yield _named(_STEPS, "steps", 1)[0]
    for step in steps:
        begin = step.launched_s * 1e6
        args = msgspec.structs.asdict(step)
        name = f"{step.num_rows} rows, {step.num_tokens} tokens"
        # Steps overlap: one is launched before the one before it is read. An async slice each keeps them whole.
        place = {"cat": "step", "id": f"{begin:.3f}", "pid": _STEPS, "tid": 1, "name": name}
        yield {"ph": "b", "ts": begin, "args": args, **place}
        yield {"ph": "e", "ts": step.committed_s * 1e6, **place}
        for counter in ("running", "waiting", "free_blocks"):
            yield {"ph": "C", "name": counter, "ts": begin, "pid": _STEPS, "args": {counter: args[counter]}}


def _named(process: int, name: str, track: int | None = None) -> list[dict[str, Any]]:
    if track is None:
        return [{"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}]
    return [{"ph": "M", "name": "thread_name", "pid": process, "tid": track, "args": {"name": name}}]
