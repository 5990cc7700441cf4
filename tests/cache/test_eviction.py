"""Victims come in the order that each strategy promises; pinned blocks and parents stay."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jserve.cache.eviction import STRATEGIES, EvictionOrder
from jserve.errors import ConfigError


def key(i: int) -> bytes:
    return i.to_bytes(16, "big")


def order_of(strategy: str, *blocks: int) -> EvictionOrder:
    order = EvictionOrder(strategy)
    for block in blocks:
        order.insert(key(block))
    return order


def victims(order: EvictionOrder) -> list[int]:
    found = []
    while (victim := order.pop_victim()) is not None:
        found.append(int.from_bytes(victim, "big"))
    return found


def test_lru_evicts_what_was_not_used_for_longest() -> None:
    order = order_of("lru", 1, 2, 3)
    order.touch(key(1))
    assert victims(order) == [2, 3, 1]


def test_fifo_evicts_the_oldest_however_often_it_was_used() -> None:
    order = order_of("fifo", 1, 2, 3)
    order.touch(key(1))
    order.pin(key(1))
    order.unpin(key(1))
    assert victims(order) == [1, 2, 3]


def test_lookahead_evicts_what_is_needed_last_and_the_furthest_first() -> None:
    order = order_of("lookahead", 1, 2, 3, 4)
    order.set_lookahead([([key(2)], 1), ([key(1), key(9)], 2), ([key(9)], 1)])
    assert victims(order) == [3, 4, 1, 2]


def test_lookahead_forgets_requests_that_have_gone() -> None:
    order = order_of("lookahead", 1, 2, 3)
    order.set_lookahead([([key(1)], 1), ([key(2)], 1)])
    order.set_lookahead([([key(2)], 1)])
    assert victims(order) == [1, 3, 2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_chain_goes_from_its_tail_to_its_head(strategy: str) -> None:
    order = EvictionOrder(strategy)
    for block in (1, 2, 3):
        order.insert(key(block), parent=key(block - 1))
    order.touch(key(3))
    assert victims(order) == [3, 2, 1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_chain_found_after_a_restart_goes_from_its_tail_too(strategy: str) -> None:
    order = order_of(strategy, 1, 2, 3)
    for block in (3, 2):
        order.learn(key(block), parent=key(block - 1))
    order.learn(key(9), parent=key(8))  # has gone meanwhile
    assert victims(order) == [3, 2, 1]


def test_a_chain_is_used_by_its_last_block() -> None:
    order = order_of("lru", 1, 10)
    for block in (2, 3):
        order.insert(key(block), parent=key(block - 1))
        order.insert(key(10 * block), parent=key(10 * block - 10))
    order.use([key(1), key(2), key(3)], 2)  # a child is as old as before, its parents are young
    order.touch(key(10))
    assert victims(order) == [3, 30, 20, 2, 1, 10]


def test_a_chain_that_is_needed_by_its_last_block_stays_whole() -> None:
    order = EvictionOrder("lookahead")
    for block in (1, 2, 3, 4):
        order.insert(key(block), parent=key(block - 1) if block > 1 else None)
    for block in (11, 12):
        order.insert(key(block), parent=key(block - 1) if block > 11 else None)
    order.set_lookahead([([key(1), key(2), key(3), key(4)], 3)])
    assert victims(order) == [4, 12, 11, 3, 2, 1]
    assert not order._positions


def test_a_head_shared_by_two_chains_outlives_both() -> None:
    order = order_of("fifo", 1)
    order.insert(key(2), parent=key(1))
    order.insert(key(3), parent=key(1))
    assert victims(order) == [2, 3, 1]


def test_a_head_that_comes_back_after_its_tail_outlives_it() -> None:
    order = order_of("fifo", 1)
    order.insert(key(2), parent=key(1))
    order.remove(key(1))
    order.insert(key(1))
    order.pin(key(2))
    assert victims(order) == []
    order.unpin(key(2))
    assert victims(order) == [2, 1]


def test_a_block_is_kept_until_each_pin_is_gone() -> None:
    order = order_of("lru", 1)
    order.pin(key(1))
    order.pin(key(1))
    order.unpin(key(1))
    assert order.is_pinned(key(1))
    assert order.pop_victim() is None
    order.unpin(key(1))
    assert order.pop_victim() == key(1)
    assert len(order) == 0


def test_wrong_use_is_refused() -> None:
    order = order_of("lru", 1)
    with pytest.raises(ValueError, match="in this tier already"):
        order.insert(key(1))
    with pytest.raises(ValueError, match="nobody has pinned"):
        order.unpin(key(1))
    with pytest.raises(ConfigError, match=r"'arc'.*lru, fifo, lookahead"):
        EvictionOrder("arc")


def test_returns_evicts_what_is_due_farthest_from_now_on_either_side() -> None:
    order = order_of("returns", 1, 2, 3, 4)
    for block, due_s in ((1, 70.0), (2, 95.0), (3, 110.0), (4, 140.0)):
        order.expect(key(block), due_s)
    order.now_s = 100.0
    assert order.victim_due_s() == 140.0
    assert victims(order) == [4, 1, 3, 2]
    assert order.victim_due_s() is None


def test_what_is_overdue_goes_before_what_is_due_as_soon_as_it_is_the_farther() -> None:
    order = order_of("returns", 1, 2)
    order.expect(key(1), 50.0)
    order.expect(key(2), 100.0)
    order.now_s = 70.0
    assert order.victim_due_s() == 100.0
    order.now_s = 80.0
    assert order.victim_due_s() == 50.0


def test_the_head_of_a_conversation_is_due_when_its_tail_was() -> None:
    order = order_of("returns", 1, 9)
    order.insert(key(2), key(1), due_s=30.0)
    order.expect(key(9), 20.0)
    assert victims(order) == [2, 1, 9]


def test_what_is_used_is_expected_no_more() -> None:
    order = order_of("returns", 1, 2)
    order.expect(key(1), 500.0)
    order.now_s = 10.0
    order.touch(key(1))
    assert victims(order) == [2, 1]


class NaiveOrder:
    """The same contract by looking at every block every time."""

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self.blocks: dict[int, dict[str, float]] = {}
        self.parents: dict[int, int] = {}
        self.ahead: dict[int, int] = {}
        self.now = 0
        self.now_s = 0.0

    def tick(self) -> int:
        self.now += 1
        return self.now

    def victim(self) -> int | None:
        def rank(block: int) -> tuple[float, float]:
            if self.strategy == "returns":
                return (self.blocks[block]["due"], self.blocks[block]["used"])
            if self.strategy == "fifo":
                return (0, self.blocks[block]["inserted"])
            if self.strategy == "lookahead" and block in self.ahead:
                return (1, -self.ahead[block])
            return (0, self.blocks[block]["used"])

        parents = {self.parents[block] for block in self.blocks if block in self.parents}
        free = [block for block in self.blocks if not self.blocks[block]["pins"] and block not in parents]
        if self.strategy != "returns" or not free:
            return min(free, key=rank, default=None)
        first, last = min(free, key=rank), max(free, key=rank)
        return first if self.now_s - self.blocks[first]["due"] >= self.blocks[last]["due"] - self.now_s else last

    def remove(self, block: int) -> None:
        gone, parent = self.blocks.pop(block), self.parents.get(block)
        place = self.ahead.pop(block, None)
        if parent in self.blocks:
            for what in ("used", "due"):
                self.blocks[parent][what] = max(self.blocks[parent][what], gone[what])
            if place is not None:
                self.ahead[parent] = min(self.ahead.get(parent, place), place)


BLOCKS = st.integers(1, 12)
MOVES = st.one_of(
    st.tuples(st.sampled_from(["insert", "touch", "pin", "unpin", "remove"]), BLOCKS),
    st.tuples(st.just("victim"), st.none()),
    st.tuples(st.just("pass"), st.integers(0, 9)),
    st.tuples(st.just("expect"), st.tuples(BLOCKS, st.integers(0, 30))),
    st.tuples(st.just("ahead"), st.lists(BLOCKS, max_size=6, unique=True)),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(STRATEGIES)), st.lists(MOVES, max_size=80), st.booleans())
def test_any_sequence_of_moves_gives_the_victims_of_the_naive_order(
    strategy: str, moves: list[tuple[str, object]], chained: bool
) -> None:
    order, naive = EvictionOrder(strategy), NaiveOrder(strategy)
    for move, what in moves:
        if move == "victim":
            expected = naive.victim()
            assert order.pop_victim() == (None if expected is None else key(expected))
            if expected is not None:
                naive.remove(expected)
        elif move == "pass":
            order.now_s = naive.now_s = naive.now_s + what  # type: ignore[operator]
        elif move == "expect":
            block, gap_s = what  # type: ignore[misc]
            order.expect(key(block), naive.now_s + gap_s)
            if block in naive.blocks:
                naive.blocks[block]["due"] = naive.now_s + gap_s
        elif move == "ahead":
            here = [block for block in what if block in naive.blocks]  # type: ignore[attr-defined]
            naive.ahead = {block: i for i, block in enumerate(here)}
            order.set_lookahead(([key(block)], 1) for block in what)  # type: ignore[attr-defined]
        else:
            apply(order, naive, move, what, chained)  # type: ignore[arg-type]
        assert len(order) == len(naive.blocks)


def apply(order: EvictionOrder, naive: NaiveOrder, move: str, block: int, chained: bool) -> None:
    present = naive.blocks.get(block)
    if move == "insert" and present is None:
        now = naive.tick()
        naive.blocks[block] = {"inserted": now, "used": now, "pins": 0, "due": naive.now_s}
        if chained and block > 1:
            naive.parents[block] = block // 2
        order.insert(key(block), key(block // 2) if chained and block > 1 else None)
    elif present is None:
        return
    elif move == "touch":
        present["used"], present["due"] = naive.tick(), naive.now_s
        order.touch(key(block))
    elif move == "pin":
        present["pins"] += 1
        order.pin(key(block))
    elif move == "unpin" and present["pins"]:
        present["pins"] -= 1
        order.unpin(key(block))
    elif move == "remove":
        naive.remove(block)
        order.remove(key(block))


@settings(max_examples=100, deadline=None)
@given(st.lists(MOVES, max_size=80), st.booleans())
def test_where_nothing_is_predicted_returns_is_lru(moves: list[tuple[str, object]], chained: bool) -> None:
    order, lru = EvictionOrder("returns"), NaiveOrder("lru")
    for move, what in moves:
        if move == "victim":
            expected = lru.victim()
            assert order.pop_victim() == (None if expected is None else key(expected))
            if expected is not None:
                lru.remove(expected)
        elif move == "pass":
            order.now_s = lru.now_s = lru.now_s + what  # type: ignore[operator]
        elif move not in ("ahead", "expect"):
            apply(order, lru, move, what, chained)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["lru", "returns"])
def test_the_heap_stays_as_small_as_the_tier(strategy: str) -> None:
    order = order_of(strategy, *range(10))
    for i in range(10_000):
        order.now_s += 1
        order.touch(key(i % 10))
    assert max(len(order._heap), len(order._far)) <= 2 * len(order) + 65
