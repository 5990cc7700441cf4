"""Costs that are fitted to a run predict other runs: shown in a world whose costs are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.sim_error import COMPARED, Compared, chats, simulated, together
from jserve.cache.cost import DecodeCost, PrefillCost
from jserve.calibrate import measure_steps
from jserve.config import RunnerConfig
from jserve.engine import Engine
from jserve.errors import ConfigError
from jserve.simulation.doors import VOCAB_SIZE, Spread, TimedClock
from jserve.simulation.fitting import RecordingExecutor, StepSample, fit_steps
from jserve.simulation.playing import play
from jserve.simulation.profiles import hardware, model_shape
from jserve.simulation.simulator import System, build, simulate, system
from jserve.simulation.workload import Users

TRUTH = PrefillCost(4e-3, 1.5e-3, 1e-7), DecodeCost(20e-3, 1e-3, 2e-6)


def machine() -> System:
    """As small and slow as a laptop, running steps ahead as the real engine does."""
    described = system(hardware("cpu"), model_shape("smollm2-135m"), max_model_len=2048, bytes_per_number=4)
    prefill, decode = (replace(cost) for cost in TRUTH)
    config = replace(described.config, runner=RunnerConfig(overlap=True))
    cost = replace(described.cost, prefill=prefill, decode=decode)
    return replace(described, cost=cost, config=config, device_blocks=500, token_budget=256)


def recorded(of: System, seed: int) -> list[StepSample]:
    """The steps of an engine that stands in for the real one."""
    engine, executor = build(of)
    recorder = RecordingExecutor(executor, engine.clock)
    engine.executor = recorder
    work = chats(12, 4, seed)
    users = Users(work, VOCAB_SIZE)
    assert isinstance(engine, Engine)
    assert isinstance(engine.clock, TimedClock)
    engine.clock.alarms.append(lambda: users.next_s)
    play(engine, work, users=users)
    return recorder.samples


def test_what_is_fitted_to_one_run_predicts_another() -> None:
    of = machine()
    prefill, decode, spread = fit_steps(recorded(of, seed=1))
    fitted = replace(of, cost=replace(of.cost, prefill=prefill, decode=decode), spread=spread)
    other = chats(12, 4, seed=2)
    real = simulate(of, other, most_steps=1).played
    done = Compared(prefill, decode, [real], [simulated(fitted, other)])
    assert {metric: round(done.error(name), 2) for metric, name in COMPARED.items()} == dict.fromkeys(COMPARED, 0.0)


def test_steps_vary_in_the_simulation_as_they_were_seen_to() -> None:
    calm = [StepSample(2, 500, 2, 0.0, 0.02)] * 50 + [StepSample(0, 0, 64, 2048.0, 0.1)] * 50
    varied = [replace(s, seconds=s.seconds * (0.9 if i % 2 else 1.1)) for i, s in enumerate(calm)]
    disturbed = [*varied, replace(varied[0], seconds=9.0)]
    for samples, seen in ((calm, {1.0}), (varied, {0.9, 1.1}), (disturbed, {0.9, 1.1})):
        prefill, decode, spread = fit_steps(samples)
        for ratios, fitted_s, mean_s in (
            (spread.decode, decode.seconds(2, 500), 0.02),
            (spread.mixed, prefill.overhead_s + 64 * prefill.per_token_s + 2048 * prefill.per_pair_s, 0.1),
        ):
            assert fitted_s * sum(ratios) / len(ratios) == pytest.approx(mean_s, rel=0.01)
            assert {round(ratio, 1) for ratio in ratios} == seen


def test_a_spread_is_drawn_by_its_seed_and_makes_queues_longer() -> None:
    of, work = machine(), chats(24, 8, seed=5)
    wide = Spread(decode=(0.5, 1.5), mixed=(0.5, 1.5))
    steady, once, again, other = (
        simulate(replace(of, spread=spread), work, most_steps=1).played
        for spread in (None, wide, wide, replace(wide, seed=1))
    )
    assert once.calls == again.calls != other.calls
    late = [together([played])["ttft_p95_s"] for played in (steady, once, other)]
    assert late[0] < min(late[1:])


def test_disturbed_steps_do_not_move_the_fit() -> None:
    samples = recorded(machine(), seed=1)
    noisy = [replace(s, seconds=8 * s.seconds) if i % 11 == 0 else s for i, s in enumerate(samples)]
    (_, calm, _), (_, disturbed, _) = fit_steps(samples), fit_steps(noisy)
    assert disturbed.seconds(4, 1000) == pytest.approx(calm.seconds(4, 1000), rel=0.02)


def test_calibration_finds_what_steps_take_by_tokens_sequences_and_context() -> None:
    of = machine()
    for overlap in (False, True):
        engine, _ = build(replace(of, config=replace(of.config, runner=RunnerConfig(overlap=overlap))))
        start_s = engine.clock.now()
        prefill, decode = measure_steps(engine)
        true_prefill, true_decode = TRUTH
        assert prefill.seconds(500) == pytest.approx(true_prefill.seconds(500), rel=0.1)
        assert decode.per_sequence_s == pytest.approx(true_decode.per_sequence_s, rel=0.05)
        assert decode.per_context_token_s == pytest.approx(true_decode.per_context_token_s, rel=0.1)
        assert decode.seconds(4, 1000) == pytest.approx(true_decode.seconds(4, 1000), rel=0.02)
        assert engine.clock.now() - start_s < 20, "a few seconds on a laptop that computes 600 tokens a second"
        assert not engine.has_work


def test_too_little_work_is_told() -> None:
    with pytest.raises(ConfigError, match="too few to fit"):
        fit_steps([StepSample(1, 10, 1, 0.0, 0.01)] * 20)


def test_the_work_is_drawn_by_the_seed_and_shares_nothing() -> None:
    assert chats(5, 2, 1) == chats(5, 2, 1)
    contents = [s.content for c in chats(5, 2, 1).sessions for turn in c.turns for s in turn.prompt]
    assert len(set(contents)) == len(contents)
