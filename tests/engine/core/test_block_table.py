"""Block tables: growth, copy-on-write, and that sources of copies stay held until the step is over."""

from __future__ import annotations

import pytest

from engine.block_pool import BlockPool, PoolExhaustedError
from engine.block_table import BlockTable


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(8, 4)


def test_grows_by_whole_blocks(pool: BlockPool) -> None:
    table = BlockTable(pool)
    assert table.ensure(1) == []
    assert (len(table), table.num_tokens) == (1, 1)
    table.ensure(4)
    assert len(table) == 1
    assert table.blocks_needed(13) == 3
    table.ensure(13)
    assert len(table) == 4
    table.ensure(2)
    assert (len(table), table.num_tokens) == (4, 13)
    table.free()
    assert (len(table), table.num_tokens, pool.num_free) == (0, 0, 8)


def test_forks_share_until_they_write(pool: BlockPool) -> None:
    parent = BlockTable(pool)
    parent.ensure(6)
    child = parent.fork()
    assert (child.blocks, child.num_tokens) == (parent.blocks, 6)
    old = parent.blocks[1]
    assert child.blocks_needed(7) == 1
    assert child.ensure(7) == [(old, child.blocks[1])]
    assert child.blocks[0] == parent.blocks[0]
    assert child.blocks[1] != old
    child.settle()
    assert parent.ensure(7) == []  # alone now: writes in place
    assert child.ensure(8) == []
    pool.check_integrity([parent.held, child.held])


def test_a_full_shared_block_is_not_copied_for_what_lies_behind_it(pool: BlockPool) -> None:
    parent = BlockTable(pool)
    parent.ensure(4)
    child = parent.fork()
    assert child.ensure(5) == []
    assert child.blocks[0] == parent.blocks[0]


def test_recomputing_the_last_token_of_a_cached_prompt_copies_its_block(pool: BlockPool) -> None:
    first = BlockTable(pool)
    first.ensure(8)
    first.register_full([b"a", b"b"], 8)
    first.free()
    again = BlockTable(pool)
    again.adopt(pool.match([b"a", b"b"]))
    assert again.num_tokens == 8
    source = again.blocks[1]
    assert again.ensure(8) == []  # nothing to write, nothing to copy
    assert again.ensure(8, start=7) == [(source, again.blocks[1])]
    assert pool.peek([b"a", b"b"]) == 2  # the published block is untouched


def test_sources_stay_held_until_the_step_is_over(pool: BlockPool) -> None:
    table = BlockTable(pool)
    table.ensure(4)
    table.register_full([b"a"], 4)
    ((source, _),) = table.ensure(4, start=3)
    assert pool.ref_count(source) == 1  # else another sequence could get it before the copy has run
    assert source in table.held
    table.register_full([b"a"], 4)
    assert pool.ref_count(source) == 0
    assert table.held == table.blocks


@pytest.mark.parametrize("end", ["settle", "free", "ensure"])
def test_every_end_of_a_step_settles(pool: BlockPool, end: str) -> None:
    table = BlockTable(pool)
    table.ensure(2)
    other = table.fork()
    ((source, _),) = table.ensure(3)
    assert pool.ref_count(source) == 2
    table.ensure(4) if end == "ensure" else getattr(table, end)()
    assert pool.ref_count(source) == 1
    pool.check_integrity([table.held, other.held])


def test_a_copied_block_can_be_published_again(pool: BlockPool) -> None:
    table = BlockTable(pool)
    table.ensure(4)
    table.register_full([b"a"], 4)
    table.ensure(4, start=3)
    pool.reset_prefix_cache()
    table.register_full([b"a"], 4)
    assert pool.match([b"a"]) == table.blocks


def test_exhaustion_leaves_the_table_as_it_was() -> None:
    pool = BlockPool(3, 4)
    table = BlockTable(pool)
    table.ensure(6)
    child = table.fork()
    before = list(child.blocks)
    with pytest.raises(PoolExhaustedError):
        child.ensure(9)  # one copy and one more block, but only one is free
    assert (child.blocks, child.num_tokens) == (before, 6)
    pool.check_integrity([table.held, child.held])
    assert len(child.ensure(7)) == 1


def test_only_full_computed_hashed_blocks_are_published(pool: BlockPool) -> None:
    table = BlockTable(pool)
    table.ensure(12)
    table.register_full([b"a", b"b", b"c"], 7)
    assert pool.peek([b"a", b"b"]) == 1
    table.register_full([b"a", b"b"], 12)
    assert pool.peek([b"a", b"b", b"c"]) == 2


def test_drafts_take_free_blocks_only_and_give_them_back(pool: BlockPool) -> None:
    table, other = BlockTable(pool), BlockTable(pool)
    table.ensure(7)
    other.ensure(16)
    assert table.extend(8)
    assert table.extend(14)
    assert (len(table), table.num_tokens, pool.num_free) == (4, 14, 0)
    assert not table.extend(17)
    assert (len(table), table.num_tokens) == (4, 14)
    table.trim(9)
    assert (len(table), table.num_tokens, pool.num_free) == (3, 9, 1)
    table.trim(9)
    assert table.ensure(10, start=9) == []
    pool.check_integrity([table.held, other.held])


def test_drafts_leave_the_sources_of_copies_held(pool: BlockPool) -> None:
    parent = BlockTable(pool)
    parent.ensure(6)
    child = parent.fork()
    ((source, _),) = child.ensure(7)
    assert child.extend(10)
    assert source in child.held
    child.trim(7)
    child.settle()
    pool.check_integrity([parent.held, child.held])
