"""Order `pace`: who answers ahead of its reader gives way, unseen, and is back before the reader has caught up.

A step takes 10 ms here, and readers take 200 ms a token, if nothing else is said.
"""

from __future__ import annotations

from simulation import events_of, make_engine, make_tiered_engine, request

from jserve.engine import Engine
from jserve.request import Terms
from jserve.sched.sequence import Sequence
from jserve.sched.turns import LOOK_TOKENS, Turns
from jserve.simulated import expected_tokens

VOCAB = 97
LONG, SHORT = list(range(8)), list(range(40, 48))


def told_at(engine: Engine, more: dict[int, tuple[str, list[int], int, Terms]]) -> dict[str, list[float]]:
    """When each request's tokens were told; `more` come after so many steps."""
    times: dict[str, list[float]] = {}
    for step in range(20_000):
        if step in more:
            name, prompt, answer, terms = more.pop(step)
            engine.add(request(name, prompt, answer, terms=terms))
        if not engine.has_work and not more:
            return times
        for output in engine.step():
            times.setdefault(output.request_id, []).extend([engine.clock.now()] * len(output.token_ids))
    raise AssertionError("it never ends")


def preempted(engine: Engine) -> list[tuple[str, str | None]]:
    return [(e.request_id, e.by) for e in events_of(engine) if e.kind == "preempted"]


def test_one_far_ahead_of_its_reader_yields_and_is_back_in_time() -> None:
    engine = make_tiered_engine(
        blocks=60, budget=64, max_running=1, preempt="swap", order="pace", turn_tokens=16, ahead_s=5.0
    )
    times = told_at(engine, {0: ("long", LONG, 150, Terms()), 100: ("short", SHORT, 20, Terms())})
    assert preempted(engine) == [("long", "short")]
    (why,) = [e.detail for e in events_of(engine) if e.kind == "preempted"]
    assert why is not None
    assert why.endswith("far ahead of its reader")
    assert len(times["long"]) == 150
    assert all(at <= 2.0 + 0.2 * i for i, at in enumerate(times["long"])), "its reader never waits"
    assert times["short"][0] < 1.1, "and the other did not wait for the end of it"


def test_by_arrival_the_other_waits_for_the_end() -> None:
    engine = make_tiered_engine(blocks=60, budget=64, max_running=1, preempt="swap", order="flashgen")
    times = told_at(engine, {0: ("long", LONG, 150, Terms()), 100: ("short", SHORT, 20, Terms())})
    assert preempted(engine) == []
    assert times["short"][0] > times["long"][-1]


def test_nobody_yields_who_is_not_far_enough_ahead() -> None:
    for terms, ahead_s in ((Terms(), 60.0), (Terms(slo_tpot_s=0.01), 5.0)):
        engine = make_engine(blocks=60, budget=64, max_running=1, order="pace", turn_tokens=16, ahead_s=ahead_s)
        told_at(engine, {0: ("long", LONG, 150, terms), 100: ("short", SHORT, 20, Terms())})
        assert preempted(engine) == []


def test_a_turn_is_never_cut_short() -> None:
    engine = make_engine(blocks=200, budget=64, max_running=1, order="pace", turn_tokens=100, ahead_s=0.0)
    more = {n: (f"r{n}", [n % 90] * 8, 30, Terms()) for n in range(20, 200, 20)}
    times = told_at(engine, {0: ("long", LONG, 150, Terms())} | more)
    assert ("long", "r20") in preempted(engine)
    assert times["r20"][0] > times["long"][99]
    for name in [name for name in times if name != "long"]:
        assert times[name][-1] - times[name][0] < 0.3 + 1e-6, "30 tokens are less than a turn"


def test_two_long_ones_take_turns_and_say_the_same() -> None:
    engine = make_tiered_engine(
        blocks=60, budget=64, max_running=1, preempt="swap", order="pace", turn_tokens=16, ahead_s=1.0
    )
    answers: dict[str, list[int]] = {}
    engine.add(request("a", LONG, 120))
    engine.add(request("b", SHORT, 120))
    for _ in range(10_000):
        if not engine.has_work:
            break
        for output in engine.step():
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    assert answers == {"a": expected_tokens(LONG, 120, VOCAB), "b": expected_tokens(SHORT, 120, VOCAB)}
    assert {("a", "b"), ("b", "a")} <= set(preempted(engine))
    assert len(preempted(engine)) <= 240 // 16


def test_the_rank_after_a_turn_is_when_the_reader_needs_the_next_token() -> None:
    turns = Turns(turn_tokens=10, ahead_s=4.0)
    sequence = Sequence("a", [0] * 30, None, frozenset(), None, 1000, num_prompt=10)  # type: ignore[arg-type]
    sequence.arrival_rank = (2.0, 7)
    turns.begin(sequence)
    assert (sequence.rank, sequence.turn_limit) == ((2.0, 7), 30)
    assert turns.over(sequence, 0.2, now_s=2.0) == (2.0 + 0.2 * 20, 7)
    assert sequence.turn_limit == 20 + LOOK_TOKENS
    assert turns.over(sequence, 0.2, now_s=2.1) == (2.0, 7), "3.9 s are not far ahead"


def test_nobody_who_has_a_chunk_in_a_step_yields_in_it() -> None:
    """One begins its turn before one that waits and did not fit, and shares a prompt with it: now it does fit."""
    limits = {"blocks": 24, "budget": 20, "max_running": 3, "reuse": True, "admission": "queue"}
    engine = make_engine(**limits, order="pace", turn_tokens=3, ahead_s=0.0, slo_tpot_s=0.02)
    a, b, late = [0] * 56, [1] * 28, Terms(slo_ttft_s=5.0)
    default = Terms()
    work = [(a, 7, default, 2), (b, 6, default, 2), (a, 5, default, 0), (a, 4, default, 3), (a, 4, default, 2)]
    work += [(a, 1, late, 3), (a, 1, default, 1000)]
    said: dict[str, list[int]] = {}
    for i, (prompt, answer, terms, steps) in enumerate(work):
        engine.add(request(str(i), prompt, answer, terms=terms))
        for output in (output for _ in range(steps) if engine.has_work for output in engine.step()):
            said.setdefault(output.request_id, []).extend(output.token_ids)
    assert said == {str(i): expected_tokens(prompt, answer, VOCAB) for i, (prompt, answer, *_) in enumerate(work)}
