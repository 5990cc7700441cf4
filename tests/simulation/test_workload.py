"""A workload says what is asked, when, and after what: the same for every engine that plays it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from jserve.errors import ConfigError
from jserve.simulation.workload import (
    Segment,
    Session,
    Turn,
    Users,
    Workload,
    bursts,
    chat_session,
    closed_loop,
    compressed,
    contents,
    poisson,
    split_to,
)


def chats(count: int, turns: int = 2) -> Workload:
    fresh = contents()
    return Workload("chats", tuple(chat_session(str(n), [(10, 20)] * turns, fresh) for n in range(count)))


def played(users: Users, seconds_each: float = 1.0) -> list[tuple[float, str, int, int]]:
    """Every call in order: when, session, turn, prompt tokens. Each takes so long, all at once."""
    calls, now_s = [], 0.0
    while users.has_work:
        now_s = max(now_s, users.next_s)
        for call, player in list(users.due(now_s)):
            calls.append((call.due_s, call.session.id, call.turn, len(call.token_ids)))
            users.answered(call, player, [7] * call.output_tokens, call.due_s + seconds_each)
    return calls


def test_a_turn_is_sent_after_the_user_has_read_the_answer_and_written_the_question() -> None:
    first, second = played(Users(chats(1), 1000))
    assert first[0] == pytest.approx(10 * 0.2)
    assert second[0] == pytest.approx(first[0] + 1.0 + (10 + 20) * 0.2)


def test_a_later_turn_carries_the_whole_history_with_the_engines_own_answer() -> None:
    assert [tokens for *_, tokens in played(Users(chats(1, turns=3), 1000))] == [10, 40, 70]


def test_a_closed_loop_never_has_more_calls_open_than_clients_and_plays_all_sessions() -> None:
    users = Users(closed_loop(chats(9), 3), 1000)
    most, now_s, ended = 0, 0.0, []
    while users.has_work:
        now_s = max(now_s, users.next_s)
        for call, player in list(users.due(now_s)):
            most = max(most, users.open_calls)
            ended.append((call.session.id, call.turn))
            users.answered(call, player, [7], now_s + 1)
    assert most <= 3
    assert sorted(ended) == sorted((str(n), turn) for n in range(9) for turn in range(2))


def test_in_an_open_loop_sessions_come_at_their_times_whatever_the_engine_does() -> None:
    work = poisson(chats(50, turns=1), 2.0, seed=1)
    calls = played(Users(work, 1000), seconds_each=1e6)
    assert [at for at, *_ in calls] == pytest.approx([session.start_s + 2.0 for session in work.sessions])


def test_poisson_has_its_rate_and_is_drawn_by_the_seed() -> None:
    work = poisson(chats(4000, turns=1), 5.0, seed=1)
    assert 4000 / work.sessions[-1].start_s == pytest.approx(5.0, rel=0.05)
    assert work == poisson(chats(4000, turns=1), 5.0, seed=1)
    assert work != poisson(chats(4000, turns=1), 5.0, seed=2)


def test_bursts_come_together_at_the_same_mean_rate() -> None:
    starts = [session.start_s for session in bursts(chats(4000, turns=1), 5.0, 8, seed=1).sessions]
    assert 4000 / starts[-1] == pytest.approx(5.0, rel=0.1)
    assert len(set(starts)) == 500


def test_compression_speeds_everything_up_alike() -> None:
    work = poisson(chats(20), 1.0, seed=1)
    twice = compressed(work, 2.0)
    assert [s.start_s for s in twice.sessions] == pytest.approx([s.start_s / 2 for s in work.sessions])
    assert twice.sessions[0].turns[1].think_s == pytest.approx(work.sessions[0].turns[1].think_s / 2)


def test_a_branch_continues_its_parent_and_not_what_was_played_last() -> None:
    turns = (
        Turn((Segment(1, 4),), 2),
        Turn((Segment(2, 8),), 2),
        Turn((Segment(3, 16),), 2, parent=0),
        Turn((Segment(4, 32),), 2, parent=-1),
    )
    session = Session("tree", turns)
    users = Users(Workload("tree", (session,)), 1000)
    prompts = {turn: tokens for _, _, turn, tokens in played(users)}
    assert prompts == {0: 4, 1: 6 + 8, 2: 6 + 16, 3: 32}
    assert session.history_of(2) == [0]
    assert session.longest_tokens == 34


def test_the_same_content_is_the_same_tokens_and_another_is_not() -> None:
    users = Users(Workload("w", (Session("a", (Turn((Segment(1, 3), Segment(2, 3)), 1),)),)), 1000)
    ((call, _),) = users.due(0.0)
    assert call.token_ids[:3] == [call.token_ids[0]] * 3
    assert call.token_ids[0] != call.token_ids[3]


def test_long_chats_are_cut_to_the_context_and_no_turn_is_lost() -> None:
    parts = list(split_to([(100, 100)] * 10, 450))
    assert [len(part) for part in parts] == [2, 2, 2, 2, 2]
    assert list(split_to([(500, 1), (1, 1)], 450)) == [[(1, 1)]]


@pytest.mark.parametrize("wrong", [lambda w: poisson(w, 0, 1), lambda w: compressed(w, 0), lambda w: closed_loop(w, 0)])
def test_impossible_arrivals_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="use"):
        wrong(chats(1))  # type: ignore[operator]


def test_due_times_never_go_back() -> None:
    times = [at for at, *_ in played(Users(closed_loop(chats(30, turns=4), 5), 1000))]
    assert all(b >= a - 1.0 for a, b in pairwise(times))
