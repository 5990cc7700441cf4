"""The production scheduler and cache over the simulated world: what they promise, for any workload."""

from __future__ import annotations

import random
from functools import partial

import pytest
import simulation
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import VOCAB, request

from jserve.engine import Engine
from jserve.errors import InvalidRequest, Overloaded
from jserve.request import EngineOutput, EngineRequest, SamplingParams
from jserve.simulated import SimulatedClock, SimulatedExecutor, SimulatedTransfer, expected_tokens

make_engine = partial(simulation.make_engine, overlap=True, reuse=True)


def run(engine: Engine, limit: int = 100_000) -> dict[str, list[EngineOutput]]:
    """Step until idle; all outputs by request."""
    outputs: dict[str, list[EngineOutput]] = {}
    for _ in range(limit):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError(f"still working after {limit} steps: {engine.stats()}")


def tokens_of(outputs: list[EngineOutput]) -> list[int]:
    return [t for output in outputs for t in output.token_ids]


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.held_blocks) == (0, 0, 0)
    assert sorted(engine.scheduler.state.running.free_slots) == list(range(engine.config.sched.max_running))


def test_a_request_gets_the_tokens_of_its_model() -> None:
    engine = make_engine()
    engine.add(request("a", [1, 2, 3, 4, 5], 7))
    outputs = run(engine)["a"]
    assert tokens_of(outputs) == expected_tokens([1, 2, 3, 4, 5], 7, VOCAB)
    assert outputs[-1].finish_reason == "length"
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prompt_of_several_steps_waits_for_nothing_between_them(overlap: bool) -> None:
    engine = make_engine(overlap=overlap, budget=16)
    engine.add(request("long", [5] * 48, 1))
    run(engine)
    assert engine.clock.now() == pytest.approx(3 * 0.01)


def test_the_second_turn_finds_the_whole_blocks_of_the_first() -> None:
    engine = make_engine()
    first = list(range(10))
    engine.add(request("a", first, 6))
    answer = tokens_of(run(engine)["a"])
    engine.add(request("b", first + answer + [7, 7], 5))
    outputs = run(engine)["b"]
    # 15 of the 16 tokens of turn one have KV (the last was never computed): three whole blocks of four.
    assert outputs[-1].cached_tokens == 12
    assert tokens_of(outputs) == expected_tokens(first + answer + [7, 7], 5, VOCAB)


def test_another_salt_finds_nothing() -> None:
    engine = make_engine()
    engine.add(request("a", list(range(12)), 2, cache_salt="tenant 1"))
    run(engine)
    engine.add(request("b", list(range(12)), 2, cache_salt="tenant 2"))
    assert run(engine)["b"][-1].cached_tokens == 0


def test_equal_prompts_that_arrive_together_share_their_blocks() -> None:
    engine = make_engine(blocks=20, budget=64)
    prompt = list(range(40))
    for name in "abcd":
        engine.add(request(name, prompt, 3))
    outputs = run(engine)
    for name in "abcd":
        assert tokens_of(outputs[name]) == expected_tokens(prompt, 3, VOCAB)
    assert engine.stats().prefill_tokens == 40 + 3 * 4
    assert engine.stats().preemptions == 0


def test_a_stop_token_ends_the_request_and_is_its_last_token() -> None:
    expected = expected_tokens([5, 6], 20, VOCAB)
    stop = expected[4]
    engine = make_engine()
    engine.add(request("a", [5, 6], 20, stop_token_ids=[stop]))
    outputs = run(engine)["a"]
    assert tokens_of(outputs) == expected[: expected.index(stop) + 1]
    assert outputs[-1].finish_reason == "stop"
    assert_nothing_is_held(engine)


def test_min_tokens_outlives_a_stop_token() -> None:
    expected = expected_tokens([5, 6], 20, VOCAB)
    engine = make_engine()
    sampling = SamplingParams(max_tokens=20, min_tokens=expected.index(expected[4]) + 1)
    engine.add(EngineRequest(request_id="a", token_ids=[5, 6], sampling=sampling, stop_token_ids=[expected[4]]))
    assert len(tokens_of(run(engine)["a"])) > expected.index(expected[4]) + 1


def test_decodes_come_before_prefill_and_a_long_prompt_is_cut_into_chunks() -> None:
    engine = make_engine(budget=16, blocks=200)
    engine.add(request("short", [1, 2], 30))
    engine.step()
    engine.add(request("long", list(range(90)), 2))
    tokens_before = 0
    while not any(o.request_id == "long" for o in engine.step()):
        tokens_before += 1
    assert tokens_before >= 90 // 15, "the long prompt takes several steps"
    assert all(record.num_tokens <= 16 for record in engine.step_records())


def test_when_blocks_run_out_the_youngest_is_preempted_and_says_the_same() -> None:
    engine = make_engine(blocks=12, block_size=4, budget=32)
    for i in range(4):
        engine.add(request(str(i), [i, 1, 2, 3], 24))
    outputs = run(engine)
    assert engine.stats().preemptions > 0
    for i in range(4):
        assert tokens_of(outputs[str(i)]) == expected_tokens([i, 1, 2, 3], 24, VOCAB)
    assert_nothing_is_held(engine)


def test_requests_end_in_order_of_arrival_when_they_are_alike() -> None:
    engine = make_engine(blocks=12, max_running=3)
    for i in range(9):
        engine.add(request(str(i), [i, 1, 2], 20))
    ended = []
    while engine.has_work:
        ended += [o.request_id for o in engine.step() if o.finish_reason]
    assert ended == [str(i) for i in range(9)]


def test_output_is_bounded_by_context_and_pool() -> None:
    engine = make_engine(blocks=4, block_size=4)
    engine.add(request("a", list(range(10)), 1000))
    outputs = run(engine)["a"]
    assert len(tokens_of(outputs)) == 6
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        ([1] * 16, "at most 15"),
        ([1, VOCAB], f"token id {VOCAB} is outside the vocabulary"),
        ([1, -1], "token id -1"),
    ],
)
def test_a_prompt_that_can_never_run_is_refused(prompt: list[int], message: str) -> None:
    engine = make_engine(blocks=4, block_size=4)
    with pytest.raises(InvalidRequest, match=message):
        engine.add(request("a", prompt, 1))
    assert not engine.has_work


def test_one_request_too_many_is_refused_and_the_others_live() -> None:
    engine = make_engine(max_running=2, max_waiting=3)
    for i in range(5):
        engine.add(request(str(i), [i], 2))
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        engine.add(request("5", [5], 2))
    assert len(run(engine)) == 5


def test_a_request_id_in_use_is_refused() -> None:
    engine = make_engine()
    engine.add(request("a", [1], 5))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        engine.add(request("a", [1], 5))


WORKLOADS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "requests": st.integers(1, 14),
        "blocks": st.integers(10, 40),
        "block_size": st.sampled_from([1, 2, 4, 7]),
        "max_running": st.integers(1, 6),
        "budget": st.integers(7, 40),
        "overlap": st.booleans(),
        "reuse": st.booleans(),
        "promote_tokens": st.sampled_from([None, 0, 6]),
    }
)


@settings(max_examples=150, deadline=None)
@given(WORKLOADS)
def test_any_workload_gets_the_models_tokens_leaks_nothing_and_ends(w: dict) -> None:
    """Conversations with shared prefixes, stops, aborts in any state, too few blocks: same tokens, all freed."""
    rng = random.Random(w["seed"])
    engine = make_engine(
        blocks=w["blocks"],
        block_size=w["block_size"],
        max_running=w["max_running"],
        budget=w["budget"],
        overlap=w["overlap"],
        reuse=w["reuse"],
        promote_tokens=w["promote_tokens"],
    )
    most = engine.max_total_tokens
    prefixes = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, most))] for _ in range(3)]
    expected: dict[str, list[int]] = {}
    outputs: dict[str, list[EngineOutput]] = {}
    aborted: set[str] = set()
    waiting_names = [str(i) for i in range(w["requests"])]
    for _ in range(20_000):
        if waiting_names and rng.random() < 0.4:
            name = waiting_names.pop()
            prompt = rng.choice(prefixes)[: rng.randrange(1, most)] + [rng.randrange(VOCAB)] * rng.randrange(2)
            prompt = prompt[: most - 1]
            count = rng.randrange(1, 30)
            tokens = expected_tokens(prompt, min(count, most - len(prompt)), VOCAB)
            stop = rng.choice(tokens) if rng.random() < 0.4 else None
            engine.add(request(name, prompt, count, stop_token_ids=[] if stop is None else [stop]))
            expected[name] = tokens if stop is None else tokens[: tokens.index(stop) + 1]
        if expected and rng.random() < 0.05:
            name = rng.choice(sorted(expected))
            if not (name in outputs and outputs[name][-1].finish_reason):
                engine.abort(name)
                aborted.add(name)
        if not engine.has_work and not waiting_names:
            break
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    else:
        raise AssertionError("the workload never ends")
    for name, tokens in expected.items():
        got = tokens_of(outputs[name])
        assert outputs[name][-1].finish_reason is not None
        if name in aborted:
            assert got == tokens[: len(got)]
        else:
            assert got == tokens
    assert_nothing_is_held(engine)


def test_the_same_workload_gives_the_same_steps() -> None:
    def steps() -> list[tuple[int, int]]:
        engine = make_engine(blocks=20)
        for i in range(10):
            engine.add(request(str(i), [i] * (3 * i + 1), 9))
        run(engine)
        return [(r.num_tokens, r.num_rows) for r in engine.step_records()]

    assert steps() == steps()


def test_a_simulated_copy_ends_in_its_time_and_carries_the_kv_of_its_start() -> None:
    clock = SimulatedClock()
    executor = SimulatedExecutor(clock, num_blocks=4, block_size=2, vocab_size=VOCAB)
    transfer = SimulatedTransfer(clock, executor, host_slots=2, copy_s=lambda kind, blocks: 0.5 * blocks)
    executor.kv[1] = [7, 8]
    transfer.store(1, [1], [0])
    executor.kv[1] = [0, 0]  # overwritten at once: the copy was gathered before
    assert transfer.poll() == []
    clock.advance_to(0.5)
    assert [done.ticket for done in transfer.poll()] == [1]
    transfer.load(2, [0], [3])
    transfer.load(3, [0], [2])
    transfer.cancel(3)
    assert executor.kv[3] == [0, 0]
    clock.advance_to(1.0)
    assert [done.ticket for done in transfer.poll()] == [2]
    assert executor.kv[3] == [7, 8]
    assert executor.kv[2] == [0, 0]
    assert transfer.poll() == []
