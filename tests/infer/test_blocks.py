"""Blocks: nothing leaks, nothing is freed twice, and the cache never hands out a block that means something else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from openzaya.infer.blocks import KEPT_SHARE, BlockPool, next_key, num_blocks_for, root_key

NUM_BLOCKS = 6
EXPERTS = np.zeros((64, 2), dtype=np.uint8)


class Blocks(RuleBasedStateMachine):
    """Owners hold lists of blocks; the model of the cache is a dictionary from keys to blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        # So that all ways to find a block are taken.
        self.pool._num_kept = 2
        self.owners: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        """What each block was last published as; a new allocation forgets it."""
        self.num_keys = 0

    def held(self) -> list[int]:
        return [block for owner in self.owners for block in owner]

    @rule()
    def new_owner(self) -> None:
        self.owners.append([])

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def allocate(self, data) -> None:
        touched = self.pool.num_touched
        block = self.pool.allocate()
        assert (block is None) == (len(set(self.held())) == NUM_BLOCKS)
        assert self.pool.num_touched - touched in (0, 1)
        if block is not None:
            assert block not in self.held()
            data.draw(st.sampled_from(self.owners)).append(block)
            self.content.pop(block, None)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def share_held(self, data) -> None:
        block = data.draw(st.sampled_from(self.held()))
        self.pool.share(block)
        self.owners.append([block])

    @precondition(lambda self: self.held())
    @rule(data=st.data(), again=st.booleans())
    def publish(self, data, again: bool) -> None:
        """A key of its own, or one that another block may have."""
        block = data.draw(st.sampled_from(self.held()))
        self.num_keys += 1
        key = b"%d" % (0 if again else self.num_keys)
        taken = self.pool.find(key) is not None or block in self.content
        self.pool.publish(block, key, EXPERTS)
        if not taken:
            self.content[block] = key
        assert self.pool.find(key) is not None or block in self.content

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def take_from_the_cache(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.content.values())))
        block = self.pool.find(key)
        if block is not None:
            assert self.content[block] == key
            self.pool.share(block)
            self.owners.append([block])

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release_owner(self, data) -> None:
        owner = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        for block in reversed(owner):
            self.pool.release(block)

    @rule()
    def clear_cache(self) -> None:
        self.pool.clear_cache()
        self.content.clear()
        assert self.pool.num_cached == 0

    @invariant()
    def counts_are_owners(self) -> None:
        held = self.held()
        for block in range(NUM_BLOCKS):
            assert self.pool.holders(block) == held.count(block)
        assert self.pool.num_free == NUM_BLOCKS - len(set(held))

    @invariant()
    def cached_blocks_are_what_they_were_published_as(self) -> None:
        assert self.pool.num_cached == len(self.content)
        for block, key in self.content.items():
            assert self.pool.find(key) == block


Blocks.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestBlocks = Blocks.TestCase


def test_the_least_recently_used_cached_block_goes_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    for number, block in enumerate(blocks):
        pool.publish(block, b"%d" % number, EXPERTS)
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release(block)
    # Used again: block 1 is now the last to go.
    pool.share(blocks[1])
    pool.release(blocks[1])
    assert [pool.allocate() for _ in range(4)] == [blocks[0], blocks[2], blocks[1], None]
    assert pool.num_cached == 0


def test_freed_blocks_are_taken_again_before_untouched_ones() -> None:
    pool = BlockPool(1000)
    first = [pool.allocate() for _ in range(5)]
    for block in first:
        pool.release(block)
    # The last one freed is the first to be taken, whether it went through the cache or not.
    assert [pool.allocate() for _ in range(5)] == first[::-1]
    for number, block in enumerate(first):
        pool.publish(block, b"%d" % number, EXPERTS)
        pool.release(block)
    pool.clear_cache()
    assert sorted(pool.allocate() for _ in range(5)) == sorted(first)
    assert pool.num_touched == 5


def test_light_load_leaves_most_of_the_pool_untouched() -> None:
    pool, num_keys = BlockPool(1000), 0
    for _ in range(500):
        blocks = [pool.allocate() for _ in range(7)]
        assert None not in blocks and len(set(blocks)) == 7
        for block in blocks[:6]:
            num_keys += 1
            pool.publish(block, b"%d" % num_keys, EXPERTS)
        for block in reversed(blocks):
            pool.release(block)
    assert pool.num_touched <= 1000 // KEPT_SHARE + 7
    # What was used last is still there, and a heavy load gets all blocks.
    assert all(pool.find(b"%d" % (num_keys - back)) is not None for back in range(1000 // KEPT_SHARE - 6))
    assert len({pool.allocate() for _ in range(1000)}) == 1000
    assert pool.allocate() is None and pool.num_cached == 0


def test_wrong_calls_are_seen() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(ValueError, match=f"block {block} is held by nobody"):
        pool.release(block)
    with pytest.raises(ValueError, match=f"block {block} is free"):
        pool.share(block)


def test_a_key_is_all_tokens_before_it_and_the_version() -> None:
    first, second = list(range(64)), list(range(64, 128))
    keys = {
        next_key(root_key(0), first),
        next_key(root_key(1), first),
        next_key(root_key(0), second),
        next_key(next_key(root_key(0), first), second),
        next_key(next_key(root_key(0), second), first),
    }
    assert len(keys) == 5
    assert next_key(root_key(0), tuple(first)) == next_key(root_key(0), first)


def test_what_was_recorded_of_a_block_comes_back() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    experts = np.arange(128, dtype=np.uint8).reshape(64, 2)
    pool.publish(block, b"a", experts)
    assert pool.experts(block) is experts


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (64, 1), (65, 2), (128, 2)])
def test_blocks_of_a_text(num_tokens: int, num_blocks: int) -> None:
    assert num_blocks_for(num_tokens) == num_blocks


def test_the_longest_part_that_a_text_begins_with_is_found_until_its_block_is_taken() -> None:
    pool, before = BlockPool(3), root_key(0)
    parts = {}
    for tokens in ([7, 8, 9], [7], [7, 8, 1, 2]):
        block = pool.allocate()
        assert block is not None
        pool.publish_part(block, before, tokens, EXPERTS[: len(tokens)])
        pool.release(block)
        parts[len(tokens)] = block
    assert pool.find_part(before, [7, 8, 9, 4]) == (parts[3], 3)
    assert pool.find_part(before, [7, 8, 9]) == (parts[3], 3)
    assert pool.find_part(before, [7, 8]) == (parts[1], 1)
    assert pool.find_part(before, [8]) is None and pool.find_part(root_key(1), [7, 8, 9]) is None
    assert len(pool.experts(parts[3])) == 3
    # The least recently used ones go first.
    assert [pool.allocate(), pool.allocate()] == [parts[3], parts[1]]
    assert pool.find_part(before, [7, 8, 9, 4]) is None
    assert pool.find_part(before, [7, 8, 1, 2]) == (parts[4], 4)
    pool.clear_cache()
    assert pool.find_part(before, [7, 8, 1, 2]) is None and pool.num_free == 1
    assert pool._part_lengths == {} and pool._part_of == {}


def test_a_part_that_is_known_stays_where_it_is() -> None:
    pool, before = BlockPool(2), root_key(0)
    first, second = pool.allocate(), pool.allocate()
    assert first is not None and second is not None
    for block in (first, second):
        pool.publish_part(block, before, [7, 8], EXPERTS[:2])
        pool.release(block)
    assert pool.find_part(before, [7, 8, 9]) == (first, 2)
    assert pool.allocate() == second and pool.allocate() == first
    assert pool.find_part(before, [7, 8, 9]) is None and pool._part_lengths == {}
