"""Plans of several decode steps, which simulations use, decide what single steps decide."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import make_engine, play, request, workload


def test_a_lone_decode_is_one_plan() -> None:
    engine = make_engine(blocks=100)
    engine.add(request("a", [1, 2, 3], 200))
    outputs = [output for _ in range(2) for output in engine.step(1000)]
    assert [len(output.token_ids) for output in outputs] == [1, 199]
    assert outputs[-1].finish_reason == "length"
    assert engine.stats().steps == 200


def test_a_stop_token_forbids_a_jump() -> None:
    engine = make_engine()
    engine.add(request("a", [1, 2, 3], 20, stop_token_ids=[96]))
    engine.step(1000)
    assert [len(o.token_ids) for o in engine.step(1000)] == [1]


def test_a_prompt_forbids_a_jump() -> None:
    engine = make_engine(budget=8)
    engine.add(request("a", [1, 2, 3], 20))
    engine.step(1000)
    engine.add(request("b", list(range(40)), 20))
    assert [len(o.token_ids) for o in engine.step(1000)] == [1]


WORLDS = st.fixed_dictionaries(
    {
        "blocks": st.integers(10, 40),
        "block_size": st.sampled_from([1, 2, 4, 7]),
        "max_running": st.integers(1, 6),
        "budget": st.integers(7, 40),
        "reuse": st.booleans(),
        "order": st.sampled_from(["flashgen", "pace"]),
        "turn_tokens": st.integers(1, 8),
        "ahead_s": st.sampled_from([0.0, 0.2]),
        "slo_ttft_s": st.sampled_from([0.05, 2.0]),
        "slo_tpot_s": st.sampled_from([0.0113, 0.0231]),  # a step takes 10 ms: none is just `ahead_s` ahead
    }
)


@settings(max_examples=100, deadline=None)
@given(WORLDS, st.integers(0, 2**32), st.integers(1, 12), st.integers(2, 50))
def test_jumps_change_no_decision(world: dict, seed: int, requests: int, max_steps: int) -> None:
    arrivals = workload(seed, requests, min(60, world["blocks"] * world["block_size"]), gap=10)
    single = play(make_engine(**world), arrivals)
    jumping = play(make_engine(**world), arrivals, max_steps)
    assert jumping.events == single.events
    assert jumping.token_steps == single.token_steps
    assert jumping.tokens == single.tokens == {a.request.request_id: a.answer for a in arrivals}
