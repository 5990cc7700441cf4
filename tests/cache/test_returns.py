"""What is learned about when conversations return, and what is predicted of those that sleep."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jserve.cache.returns import ENOUGH, MEMORY, GapModel, Returns


def key(i: int) -> bytes:
    return i.to_bytes(16, "big")


def learned(gap_s: Callable[[int, random.Random], float], returns: int = 400, seed: int = 0) -> GapModel:
    rng, model = random.Random(seed), GapModel()
    for _ in range(returns):
        tokens = rng.randrange(10, 600)
        model.observe(tokens, gap_s(tokens, rng))
    return model


def reader(tokens: int, rng: random.Random) -> float:
    """Reads at four tokens a second, and takes 15 s in the mean to think and write."""
    return tokens / 4 + rng.expovariate(1 / 15)


def test_the_time_that_people_read_is_learned_from_their_returns() -> None:
    model = learned(reader)
    assert model.slope_s == pytest.approx(0.25, rel=0.05)
    assert model.gap_s(40) == pytest.approx(25, abs=4)
    assert model.gap_s(400) == pytest.approx(115, abs=4)


def test_nothing_is_predicted_before_enough_was_seen() -> None:
    assert learned(reader, ENOUGH - 1).gap_s(100) == 0
    assert learned(reader, ENOUGH).gap_s(100) > 0


@pytest.mark.parametrize("mean_s", [0.01, 3.0, 300.0])
def test_nothing_is_predicted_where_the_answer_says_nothing(mean_s: float) -> None:
    """Agents and tools: gaps that are anything, whatever the answer."""
    assert not learned(lambda tokens, rng: rng.expovariate(1 / mean_s)).trusted
    assert not learned(lambda tokens, rng: mean_s * rng.lognormvariate(0, 1.5)).trusted


def test_a_habit_that_is_always_the_same_needs_no_answer() -> None:
    assert learned(lambda tokens, rng: rng.uniform(50, 70)).gap_s(300) == pytest.approx(60, abs=4)


def test_who_goes_to_lunch_spoils_no_prediction() -> None:
    often_away = learned(lambda tokens, rng: 5000.0 if rng.random() < 0.02 else reader(tokens, rng))
    assert often_away.trusted
    assert often_away.gap_s(300) == pytest.approx(learned(reader).gap_s(300), rel=0.25)


def test_other_people_are_learned_anew() -> None:
    model = learned(reader)
    rng = random.Random(1)
    for _ in range(4 * MEMORY):
        tokens = rng.randrange(10, 600)
        model.observe(tokens, 4 * reader(tokens, rng))
    assert model.slope_s == pytest.approx(1.0, rel=0.1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 1e6)), max_size=100))
def test_no_gap_is_negative_or_infinite(seen: list[tuple[int, float]]) -> None:
    model = GapModel()
    for tokens, gap_s in seen:
        model.observe(tokens, gap_s)
        assert 0 <= model.gap_s(tokens) < 1e9
        assert 0 <= model.gap_s(0) < 1e9


def trusting(returns: Returns) -> Returns:
    """One that has learned that people take a second for each token."""
    for i in range(2 * ENOUGH):
        returns.model.observe(10 + i, 10.0 + i)
    assert returns.model.trusted
    return returns


def test_a_conversation_wakes_at_its_leaf_and_teaches_how_long_it_slept() -> None:
    returns = Returns(100)
    returns.sleep([key(1), key(2)], 80, 50, now_s=10.0)
    assert returns.wake(key(1), 90, 15.0) is None
    assert returns.wake(key(2), 80, 16.0) is None  # asks the same again
    assert returns.wake(key(2), 81, 17.0) is not None
    assert returns.wake(key(2), 90, 18.0) is None
    assert (returns.model.seen, returns.model.mean_s) == (1, 7.0)
    assert len(returns) == 0


def test_a_conversation_is_due_when_its_answer_says_so() -> None:
    returns = trusting(Returns(100))
    assert returns.sleep([key(1)], 50, 30, now_s=100.0).due_s == pytest.approx(130.0, abs=1)
    assert returns.due_s(key(1)) == pytest.approx(130.0, abs=1)
    assert returns.due_s(key(2)) is None


def test_the_nearest_return_of_what_the_host_has_lost_is_told_first() -> None:
    returns = trusting(Returns(100))
    sleeps = {i: returns.sleep([key(i), key(10 + i)], 99, tokens, 0.0) for i, tokens in enumerate((20, 40, 90))}
    assert returns.soonest_away(0.0) is None
    for i in range(3):
        returns.leaves(key(i))  # which is no leaf
    assert returns.soonest_away(0.0) is None
    for i in range(3):
        returns.leaves(key(10 + i))
        returns.leaves(key(10 + i))
    assert returns.soonest_away(0.0) is sleeps[0]
    assert returns.soonest_away(35.0) is sleeps[1]
    assert returns.soonest_away(500.0) is sleeps[2]  # all are overdue, and this the least
    returns.is_back(sleeps[1])
    assert returns.soonest_away(35.0) is sleeps[0]
    returns.wake(sleeps[0].leaf, 100, 35.0)
    assert returns.soonest_away(35.0) is sleeps[2]


def test_those_that_have_slept_longest_are_forgotten_first() -> None:
    returns = Returns(10)
    for i in range(20):
        returns.sleep([key(100 * i), key(100 * i + 1), key(100 * i + 2)], 50, 5, float(i))
        returns.leaves(key(100 * i + 2))
    assert len(returns) == 3
    assert returns.due_s(key(1702)) == 17.0
    assert returns.due_s(key(1602)) is None
    assert len(returns._away) == 3
    returns.sleep([key(i) for i in range(50)], 900, 5, 30.0)
    assert len(returns) == 1  # however long


MOVES = st.lists(
    st.tuples(st.sampled_from(["sleep", "wake", "leave", "back", "pass"]), st.integers(0, 9), st.integers(0, 60)),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(MOVES, st.integers(1, 12))
def test_any_sequence_of_moves_agrees_with_looking_at_all_of_them(moves: list[tuple[str, int, int]], most: int) -> None:
    returns, now_s = trusting(Returns(most)), 0.0
    for move, who, amount in moves:
        leaf = key(who)
        match move:
            case "sleep":
                returns.sleep([key(20 + who)] * (who % 3) + [leaf], 70, amount, now_s)
            case "wake":
                returns.wake(leaf, 99, now_s)
            case "leave":
                returns.leaves(leaf)
            case "back" if (sleep := returns.soonest_away(now_s)) is not None:
                returns.is_back(sleep)
            case "pass":
                now_s += amount
        away = [returns._sleeping[leaf] for _, leaf in returns._away]
        assert len({sleep.leaf for sleep in away}) == len(away)
        assert returns._away == sorted(returns._away)
        assert returns._num_blocks == sum(len(sleep.keys) for sleep in returns._sleeping.values())
        assert returns._num_blocks <= max(most, 3)
        nearest = returns.soonest_away(now_s)
        least_s = min((sleep.distance_s(now_s) for sleep in away), default=None)
        assert (None if nearest is None else nearest.distance_s(now_s)) == least_s
