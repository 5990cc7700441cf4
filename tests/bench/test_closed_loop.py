"""The closed loop plays dialogues as users would, and counts what the server says, not what it happens to see."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.closed_loop import Run, Turn, percentile, play, replay, warm_up
from bench.transports import ChatError, OpenAITransport, Usage
from bench.workloads.dialogues import WorkloadError, spoken
from bench.workloads.streams import stream, worded
from jserve.simulation.workload import Segment, Session
from jserve.simulation.workload import Turn as Asked

spec = importlib.util.spec_from_file_location("fake_openai", Path(__file__).with_name("fake_openai.py"))
assert spec is not None
assert spec.loader is not None
fake_openai = sys.modules.setdefault("fake_openai", importlib.util.module_from_spec(spec))
spec.loader.exec_module(fake_openai)
FakeServer, serving = fake_openai.FakeServer, fake_openai.serving

DIALOGUES = tuple(spoken(str(n), tuple(f"{n} says {turn}" for turn in range(2 + n % 2))) for n in range(7))


def played(fake: FakeServer, dialogues: Sequence[Session] = DIALOGUES, users: int = 3) -> Run:
    async def run() -> Run:
        async with serving(fake):
            return await play(OpenAITransport(fake.url, "model", {"ignore_eos": True}), dialogues, users, max_tokens=8)

    return asyncio.run(run())


def test_every_turn_of_every_dialogue_is_played_once() -> None:
    run = played(FakeServer())
    assert sorted((t.dialogue, t.index) for t in run.turns) == [
        (d.id, i) for d in DIALOGUES for i in range(len(d.turns))
    ]


def test_never_more_calls_at_once_than_users() -> None:
    fake = FakeServer()
    played(fake, users=3)
    assert fake.most == 3


def test_the_history_holds_the_servers_own_replies() -> None:
    fake = FakeServer()
    first, second = sorted(played(fake, DIALOGUES[:1]).turns, key=lambda t: t.index)
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert second.messages[1]["content"] == first.text == " reply3.0 reply3.1 reply3.2 reply3.3"


def test_tokens_are_counted_by_the_servers_usage() -> None:
    run = played(FakeServer(pieces=4, tokens_per_piece=2))
    assert {turn.usage.output_tokens for turn in run.turns} == {8}
    assert all(len(turn.text_times_s) == 4 for turn in run.turns)


def test_requests_are_greedy_and_of_fixed_length() -> None:
    fake = FakeServer()
    played(fake)
    assert all(b["temperature"] == 0 and b["max_tokens"] == 8 and b["ignore_eos"] and b["stream"] for b in fake.bodies)


def test_a_replay_sends_the_same_prompts_each_under_a_salt_of_its_own() -> None:
    fake = FakeServer()

    async def run() -> tuple[Run, Run]:
        async with serving(fake):
            transport = OpenAITransport(fake.url, "model")
            once = await play(transport, DIALOGUES, 3, 8)
            fake.bodies.clear()
            return once, await replay(transport, once.turns, 3, 8, "again")

    once, again = asyncio.run(run())
    assert sorted(str(t.messages) for t in once.turns) == sorted(str(t.messages) for t in again.turns)
    assert len({body["cache_salt"] for body in fake.bodies}) == len(once.turns)


def test_warming_up_reaches_the_full_number_of_users() -> None:
    fake = FakeServer()

    async def run() -> None:
        async with serving(fake):
            await warm_up(OpenAITransport(fake.url, "model"), 5)

    asyncio.run(run())
    assert fake.most == 5


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (FakeServer(status=503), "503: no room left"),
        (FakeServer(break_off=True), "out of blocks"),
        (FakeServer(usage=False), "did not tell its usage"),
    ],
)
def test_a_server_that_fails_ends_the_run_with_its_own_words(fake: FakeServer, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        played(fake)


def test_no_server_is_a_chat_error() -> None:
    with pytest.raises(ChatError, match=r"http://127\.0\.0\.1:9/"):
        asyncio.run(play(OpenAITransport("http://127.0.0.1:9", "model"), DIALOGUES, 1, 8))


def turn(index: int, start_s: float, text_times_s: tuple[float, ...], end_s: float, tokens: int) -> Turn:
    return Turn("d", index, (), "", Usage(10, tokens, 4), start_s, text_times_s, end_s)


def test_ttft_is_the_first_text_and_tpot_spreads_the_rest() -> None:
    one = turn(0, 10.0, (10.5, 11.0, 12.5), 12.5, tokens=5)
    assert one.ttft_s == 0.5
    assert one.tpot_s == 0.5


def test_only_the_time_when_all_users_are_busy_counts() -> None:
    early = turn(0, 0.0, (1.0, 2.0), 2.0, tokens=10)
    late = turn(1, 1.0, (3.0, 5.0), 5.0, tokens=10)
    run = Run((early, late), 0.0, busy_until_s=4.0)
    assert run.output_tokens_per_s == (10 + 5) / 4.0
    assert run.measured() == [early]
    assert run.measured(later=True) == []


def test_cached_share_is_unknown_if_a_server_does_not_tell() -> None:
    told = turn(0, 0.0, (1.0,), 1.0, tokens=1)
    untold = Turn("d", 0, (), "", Usage(10, 1), 0.0, (1.0,), 1.0)
    assert Run((told,), 0.0, 1.0).cached_share == 0.4
    assert Run((told, untold), 0.0, 1.0).cached_share is None


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(v) for v in range(1, 21)]
    assert percentile(values, 50) == 10.0
    assert percentile(values, 95) == 19.0
    assert percentile([3.0], 95) == 3.0
    with pytest.raises(WorkloadError, match="more dialogues"):
        percentile([], 50)


def chat(turns: tuple[Asked, ...], start_s: float = 0.0) -> Session:
    return Session(f"from {start_s}", turns, start_s)


def test_replies_are_as_long_and_turns_as_late_as_the_work_says() -> None:
    fake = FakeServer()
    said = (Asked((Segment(1, 2),), 5, text="a"), Asked((Segment(2, 2),), 7, think_s=0.2, text="b"))

    async def run() -> Run:
        async with serving(fake):
            transport = OpenAITransport(fake.url, "model", {"ignore_eos": True})
            return await play(transport, [chat(said), chat(said, 0.5)], None, None)

    turns = asyncio.run(run()).turns
    assert [body["max_tokens"] for body in fake.bodies] == [5, 7, 5, 7]
    assert turns[1].start_s - turns[0].end_s >= 0.2
    assert turns[2].start_s - turns[0].start_s > 0.45


def test_a_branch_goes_on_from_the_turn_that_it_names() -> None:
    fake = FakeServer()
    said = tuple(Asked((Segment(n, 1),), 4, parent=p, text=f"q{n}") for n, p in enumerate((None, None, 0, -1)))
    turns = {t.index: t for t in played(fake, [chat(said)]).turns}
    users = {i: [m["content"] for m in t.messages if m["role"] == "user"] for i, t in turns.items()}
    assert users == {0: ["q0"], 1: ["q0", "q1"], 2: ["q0", "q2"], 3: ["q3"]}


def test_equal_contents_are_equal_words_and_about_as_many_as_tokens() -> None:
    turn = Asked((Segment(7, 30), Segment(8, 10)), 4)
    one, other = worded(chat((turn,))), worded(chat((replace(turn, prompt=(Segment(7, 30), Segment(9, 10))),)))
    (words,), (others,) = ([t.text.split() for t in s.turns] for s in (one, other))
    assert len(words) == len(others) == 40
    assert words[:30] == others[:30]
    assert words[30:] != others[30:]
    with pytest.raises(WorkloadError, match="sharegpt"):
        stream("no such work", 2048, 0)
