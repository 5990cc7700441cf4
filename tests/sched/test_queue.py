"""The queue finds the first of those that fit, whatever happens to it: compared with a scan."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from jserve.cache.kv_cache import BlockTable
from jserve.request import SamplingParams
from jserve.sched.queue import WaitingQueue
from jserve.sched.sequence import Sequence


def sequence(place: float, number: int) -> Sequence:
    made = Sequence(str(number), [1], SamplingParams(), frozenset(), BlockTable(b""), 9)
    made.rank = place, number
    return made


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 200))
def test_it_finds_what_a_scan_finds(seed: int, most_need: int, moves: int) -> None:
    rng = random.Random(seed)
    queue = WaitingQueue(most_need)
    needs: dict[Sequence, int] = {}
    gone: list[Sequence] = []
    for number in range(moves):
        match rng.choice(["push", "push", "remove", "set_need", "return"]):
            case "push":
                new = sequence(rng.randrange(20), number)
                needs[new] = rng.randint(0, most_need)
                queue.push(new, needs[new])
            case "remove" if needs:
                gone.append(rng.choice(list(needs)))
                del needs[gone[-1]]
                queue.remove(gone[-1])
            case "set_need" if needs:
                changed = rng.choice(list(needs))
                needs[changed] = rng.randint(0, most_need)
                queue.set_need(changed, needs[changed])
            case "return" if gone:
                back = gone.pop()
                back.rank = rng.choice([back.rank[0], rng.randrange(20)]), back.rank[1]  # as after a turn
                needs[back] = rng.randint(0, most_need)
                queue.push(back, needs[back])
        waiting = sorted(needs, key=lambda s: s.rank)
        room = rng.randint(-1, most_need + 2)
        assert queue.first() is next(iter(waiting), None)
        assert queue.first_fitting(room) is next((s for s in waiting if needs[s] <= room), None)
        assert list(queue) == waiting
        assert len(queue) == len(waiting)
        assert all(queue.need(s) == need for s, need in needs.items())


def test_what_is_gone_is_forgotten() -> None:
    queue = WaitingQueue(100)
    for number in range(10_000):
        waiting = sequence(0, number)
        queue.push(waiting, number % 100)
        queue.set_need(waiting, number % 7)
        queue.remove(waiting)
    assert queue._entries <= 64 + 3
    assert queue.first() is None
