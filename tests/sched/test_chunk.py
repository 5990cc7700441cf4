"""How many tokens a step takes follows the latency targets: Algorithm 1 of "Revisiting Pipeline Parallelism"."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st
from simulation import make_engine, request

from jserve.engine import Engine
from jserve.sched.chunk import STEP_TOKENS, Pace, next_chunk

CALM = Pace(running=10, free_share=0.5, ttft_slack_s=1.4, tpot_slack_s=0.1, slo_ttft_s=2.0, slo_tpot_s=0.2)


def test_tokens_that_come_too_slowly_make_chunks_smaller() -> None:
    assert next_chunk(512, dataclasses.replace(CALM, tpot_slack_s=-0.01), 2048) == 384


def test_a_first_token_that_has_time_makes_chunks_smaller() -> None:
    assert next_chunk(512, dataclasses.replace(CALM, ttft_slack_s=1.7), 2048) == 384


def test_a_first_token_in_a_hurry_makes_chunks_larger_if_the_others_have_time() -> None:
    hurry = dataclasses.replace(CALM, ttft_slack_s=0.5)
    assert next_chunk(512, hurry, 2048) == 640
    assert next_chunk(512, dataclasses.replace(hurry, tpot_slack_s=0.01), 2048) == 512


def test_between_the_thresholds_nothing_changes() -> None:
    assert next_chunk(512, CALM, 2048) == 512


def test_without_memory_a_step_is_as_small_as_its_decodes_allow() -> None:
    assert next_chunk(1024, dataclasses.replace(CALM, free_share=0.01, running=130), 2048) == 256


@given(
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.builds(
        Pace,
        running=st.integers(0, 512),
        free_share=st.floats(0, 1),
        ttft_slack_s=st.floats(-10, 10),
        tpot_slack_s=st.floats(-1, 1),
        slo_ttft_s=st.just(2.0),
        slo_tpot_s=st.just(0.2),
    ),
)
def test_it_stays_within_bounds(chunk: int, most: int, pace: Pace) -> None:
    assert min(STEP_TOKENS, most) <= next_chunk(chunk, pace, most) <= most


def largest_step(slo_ttft_s: float) -> int:
    engine = make_engine(blocks=4000, budget=1024, chunk="adaptive", slo_ttft_s=slo_ttft_s, slo_tpot_s=0.05)
    for i in range(6):
        engine.add(request(str(i), [i] * 2000, 20))
    while engine.has_work:
        engine.step()
    return max(record.num_tokens for record in engine.step_records())


def test_the_engine_takes_larger_chunks_when_first_tokens_are_late() -> None:
    assert largest_step(slo_ttft_s=60.0) == STEP_TOKENS
    assert largest_step(slo_ttft_s=0.2) > 2 * STEP_TOKENS


def test_tokens_are_the_same_with_adaptive_chunks() -> None:
    def said(engine: Engine) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {}
        for i in range(6):
            engine.add(request(str(i), list(range(i, 90)), 20))
        while engine.has_work:
            for output in engine.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
        return tokens

    assert said(make_engine(blocks=400, budget=512, chunk="adaptive")) == said(make_engine(blocks=400, budget=512))
