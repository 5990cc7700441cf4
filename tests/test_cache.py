"""Block pool, prefix index and KV cache: whatever happens, no leak, no double free, no wrong prefix."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jserve.cache.block_keys import KEY_BYTES, block_key, extend_keys, root_key
from jserve.cache.block_pool import BlockPool
from jserve.cache.kv_cache import Admission, BlockTable, KVCache
from jserve.cache.prefix_index import PrefixIndex

ROOT = root_key("model")


def test_a_key_depends_on_everything_before_it() -> None:
    assert len(root_key("m")) == KEY_BYTES == 16
    roots = {
        root_key("m"),
        root_key("n"),
        root_key("m", "tenant"),
        root_key("m", "", "adapter"),
        root_key("mt", "enant"),
    }
    assert len(roots) == 5
    assert block_key(ROOT, [1, 2]) != block_key(ROOT, [2, 1])
    assert block_key(block_key(ROOT, [1]), [2]) != block_key(block_key(ROOT, [3]), [2])


def test_keys_come_for_full_blocks_only_and_grow_with_the_tokens() -> None:
    keys: list[bytes] = []
    extend_keys(keys, ROOT, [1, 2, 3, 4, 5], 2)
    assert len(keys) == 2
    before = list(keys)
    extend_keys(keys, ROOT, [1, 2, 3, 4, 5, 6], 2)
    assert keys[:2] == before
    assert keys[2] == block_key(before[1], [5, 6])


def test_allocate_gives_exactly_what_is_asked_or_changes_nothing() -> None:
    pool = BlockPool(3, PrefixIndex())
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    blocks = pool.allocate(3)
    assert blocks is not None
    assert sorted(blocks) == [0, 1, 2]
    assert pool.allocate(1) is None


def test_the_longest_released_block_is_reclaimed_first() -> None:
    index = PrefixIndex()
    pool = BlockPool(3, index)
    blocks = pool.allocate(3)
    assert blocks is not None
    for i, block in enumerate(blocks):
        index.publish(bytes([i]), block)
    pool.release([blocks[1]])
    pool.release([blocks[0]])
    pool.hold([blocks[1]])  # used again: now it is the younger one
    pool.release([blocks[1]])
    assert pool.allocate(1) == [blocks[0]]
    assert index.match([bytes([0])]) == []
    assert index.match([bytes([1])]) == [blocks[1]]


def test_a_block_that_nobody_holds_cannot_be_released() -> None:
    pool = BlockPool(2, PrefixIndex())
    with pytest.raises(ValueError, match="block 1 is released, but nobody holds it"):
        pool.release([1])


def test_admission_counts_found_blocks_that_would_stop_being_free() -> None:
    cache = KVCache(num_blocks=4, block_size=2)
    first = BlockTable(ROOT)
    assert cache.admit(first, [1, 2, 3, 4, 5]) == Admission(0)
    cache.publish(first, [1, 2, 3, 4, 5], 5)
    cache.release(first)
    # Two blocks are found and reclaimable: they and two fresh ones make four, so a fifth does not fit.
    assert cache.admit(BlockTable(ROOT), [1, 2, 3, 4, 5, 6, 7, 8, 9]) is None
    assert cache.pool.num_free == 4
    assert cache.admit(BlockTable(ROOT), [1, 2, 3, 4, 5, 6, 7, 8]) == Admission(4)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    cache = KVCache(num_blocks=8, block_size=2)
    first = BlockTable(ROOT)
    cache.admit(first, [1, 2, 3, 4])
    cache.publish(first, [1, 2, 3, 4], 4)
    assert cache.admit(BlockTable(ROOT), [1, 2, 3, 4]) == Admission(2)


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, grow, publish and go, against a model that knows what KV each block holds."""

    @initialize(blocks=st.integers(3, 12), block_size=st.integers(1, 3))
    def start(self, blocks: int, block_size: int) -> None:
        self.cache = KVCache(blocks, block_size)
        self.live: list[tuple[BlockTable, list[int]]] = []
        self.contents: dict[int, tuple[int, ...]] = {}

    def write(self, table: BlockTable, tokens: list[int], start: int) -> None:
        """The device: each block now holds the KV of the whole prefix up to its end."""
        size = self.cache.block_size
        for i in range(start // size, len(tokens) // size):
            self.contents[table.blocks[i]] = tuple(tokens[: (i + 1) * size])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), spare=st.integers(0, 2))
    def admit(self, tokens: list[int], spare: int) -> None:
        table = BlockTable(ROOT)
        free = self.cache.pool.num_free
        fits = self.cache.fits(table, tokens, spare)
        admission = self.cache.admit(table, tokens, spare)
        assert fits == (admission is not None)
        if admission is None:
            assert self.cache.pool.num_free == free
            assert table.blocks == []
            return
        size, cached = self.cache.block_size, admission.num_cached
        assert cached % size == 0
        assert cached < len(tokens)
        for i in range(cached // size):
            assert self.contents[table.blocks[i]] == tuple(tokens[: (i + 1) * size])
        assert self.cache.pool.num_free >= spare
        self.write(table, tokens, cached)
        self.cache.publish(table, tokens, len(tokens))
        self.live.append((table, tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        table, tokens = data.draw(st.sampled_from(self.live))
        before = list(table.blocks)
        if self.cache.extend(table, len(tokens) + 1):
            tokens.append(token)
            self.write(table, tokens, len(tokens) - 1)
            self.cache.publish(table, tokens, len(tokens))
        else:
            assert table.blocks == before
            assert self.cache.pool.num_free == 0

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.live) - 1))
        table, _ = self.live.pop(at)
        self.cache.release(table)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if not hasattr(self, "cache"):
            return
        pool = self.cache.pool
        held: dict[int, int] = {}
        for table, _ in self.live:
            assert len(set(table.blocks)) == len(table.blocks)
            for block in table.blocks:
                held[block] = held.get(block, 0) + 1
        assert {b: pool.ref_count(b) for b in range(pool.num_blocks) if pool.ref_count(b)} == held
        assert pool.num_free == pool.num_blocks - len(held)

    @invariant()
    def a_live_sequence_reads_its_own_prefix(self) -> None:
        if not hasattr(self, "cache"):
            return
        size = self.cache.block_size
        for table, tokens in self.live:
            for i in range(len(tokens) // size):
                assert self.contents[table.blocks[i]] == tuple(tokens[: (i + 1) * size])


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def test_truncate_drops_the_tail_alone_and_what_it_drops_stays_findable() -> None:
    cache = KVCache(num_blocks=8, block_size=2)
    tokens = list(range(10))
    table = BlockTable(root_key("m"))
    cache.admit(table, tokens)
    cache.publish(table, tokens, 10)
    head = table.blocks[:2]
    cache.truncate(table, 2)
    assert table.blocks == head
    assert cache.pool.num_free == 6
    assert cache.pool.num_reclaimable == 3
    assert cache.extend(table, 10)
    cache.publish(table, tokens, 10)
    cache.release(table)
    assert cache.pool.num_free == 8


def test_unshared_counts_what_a_release_would_free() -> None:
    cache = KVCache(num_blocks=16, block_size=2)
    tokens = list(range(9))
    a, b = BlockTable(root_key("m")), BlockTable(root_key("m"))
    cache.admit(a, tokens)
    cache.publish(a, tokens, 9)
    cache.admit(b, tokens)
    assert (cache.unshared(a), cache.unshared(b)) == (1, 1)
    assert cache.unshared(a, b) == 6
    free = cache.pool.num_free
    cache.release(b)
    assert cache.pool.num_free == free + 1
    assert cache.unshared(a) == 5


def test_need_counts_what_nobody_holds_and_wakes_its_watcher_when_that_falls() -> None:
    cache = KVCache(num_blocks=16, block_size=2)
    tokens = list(range(9))
    first, waiting = BlockTable(root_key("m")), BlockTable(root_key("m"))
    assert cache.need(waiting, tokens, "waiting") == 5
    cache.admit(first, tokens)
    assert cache.index.woken == []
    cache.publish(first, tokens, 4)
    assert cache.index.woken == ["waiting"], "its first block has come into use"
    cache.index.woken.clear()
    assert cache.need(waiting, tokens, "waiting") == 3
    cache.publish(first, tokens, 9)
    assert cache.index.woken == ["waiting"]
    cache.index.woken.clear()
    assert cache.need(waiting, tokens, "waiting") == 1
    cache.release(first)
    assert cache.need(waiting, tokens, "waiting") == 5, "kept blocks count as free, so they are needed too"
    cache.admit(first, tokens)
    assert cache.index.woken == ["waiting"]
    cache.index.woken.clear()
    assert cache.need(waiting, tokens, "waiting") == 1
    cache.release(waiting)
    cache.publish(first, tokens, 9)
    assert cache.index.woken == []


def test_fits_tells_what_would_be_once_others_had_let_go() -> None:
    cache = KVCache(num_blocks=10, block_size=2)
    a, b, c, d = (BlockTable(root_key("m")) for _ in range(4))
    shared = list(range(8))
    cache.admit(a, [*shared, 90])
    cache.publish(a, [*shared, 90], 9)
    cache.admit(b, [*shared, 91])
    assert cache.pool.num_free == 4
    wanted = [50] * 12  # 6 blocks
    assert not cache.fits(c, wanted)
    assert not cache.fits(c, wanted, without=[b])
    assert cache.fits(c, wanted, without=[a, b])
    assert not cache.fits(c, [50] * 20, spare=1, without=[a, b])
    alike = [*shared, *range(60, 67)]  # 8 blocks, of which 4 are shared
    assert cache.fits(d, alike)
    assert not cache.fits(d, alike, spare=1)
    assert cache.fits(d, alike, spare=2, without=[a, b])
    assert not cache.fits(d, alike, spare=3, without=[a, b]), "what it shares with them is not freed for it as well"


def test_the_device_takes_blocks_in_the_order_in_which_requests_completed() -> None:
    cache = KVCache(num_blocks=6, block_size=4)
    prompts = [[i] * 9 for i in range(3)]  # two full blocks and one more each
    tables = [BlockTable(root_key("salt")) for _ in prompts]
    for table, prompt in zip(tables[:2], prompts[:2], strict=True):
        assert cache.admit(table, prompt) is not None
        cache.publish(table, prompt, 9)
    first, second = list(tables[0].blocks[:2]), list(tables[1].blocks[:2])
    cache.release(tables[1])  # the one that came later completes first
    cache.release(tables[0])
    again = BlockTable(root_key("salt"))
    assert cache.admit(again, prompts[1]) is not None  # it is used again,
    assert again.blocks[:2] == second
    cache.release(again)  # and is now the one that completed last
    taken = cache.pool.allocate(6)
    assert taken is not None
    assert [block for block in taken if block in {*first, *second}] == [*reversed(first), *reversed(second)]
