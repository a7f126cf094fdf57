"""The block pool, rule by rule. `test_block_machine.py` mixes them at random."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from engine.block_pool import BlockPool, IntegrityError, PoolExhaustedError
from tandem.errors import InternalError, OverloadedError


def cached(pool: BlockPool, *names: bytes) -> list[int]:
    """Blocks registered under `names` and released: evictable."""
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.register(block, name)
    pool.release(blocks)
    return blocks


def test_allocate_and_release() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(3)
    assert len(set(blocks)) == 3
    assert (pool.num_free, pool.can_allocate(1), pool.can_allocate(2)) == (1, True, False)
    assert [pool.ref_count(block) for block in blocks] == [1, 1, 1]
    pool.check_integrity([blocks])
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached) == (4, 0)
    pool.check_integrity([])


def test_exhaustion_changes_nothing() -> None:
    pool = BlockPool(3, 16)
    cached(pool, b"a")
    held = pool.allocate(1)
    before = pool.stats
    with pytest.raises(PoolExhaustedError, match="3 KV blocks wanted, 2 of 3 free") as caught:
        pool.allocate(3)
    assert isinstance(caught.value, OverloadedError)
    assert caught.value.reason == "KV_BLOCKS_EXHAUSTED"
    assert pool.stats == before
    assert pool.peek([b"a"]) == 1
    pool.check_integrity([held])


def test_generation_changes_with_each_owner_and_is_written_in_place() -> None:
    memory = array("Q", [0, 2**64 - 1])
    pool = BlockPool(2, 16, generations=memoryview(memory))
    held = pool.allocate(2)
    assert memory.tolist() == [1, 0]  # the second wrapped
    pool.register(held[0], b"a")
    pool.acquire(held)
    pool.release(held)
    pool.release(held)
    assert pool.match([b"a"]) == [held[0]]
    assert pool.generation(held[0]) == memory[held[0]]
    assert memory.tolist() == [1, 0]  # sharing isn't reuse
    pool.release([held[0]])
    pool.allocate(2)
    assert memory.tolist() == [2, 1]


def test_match_takes_the_longest_prefix_and_acquires() -> None:
    pool = BlockPool(4, 16)
    a, b, c = cached(pool, b"a", b"b", b"c")
    assert pool.peek([b"a", b"b", b"x", b"c"]) == 2
    assert pool.num_free == 4  # peek holds nothing
    assert pool.match([b"a", b"b", b"x", b"c"]) == [a, b]
    assert pool.match([b"a"]) == [a]
    assert pool.match([b"x", b"a"]) == []
    assert [pool.ref_count(block) for block in (a, b, c)] == [2, 1, 0]
    assert pool.num_free == 2
    stats = pool.stats
    assert (stats.queried_blocks, stats.hit_blocks) == (7, 3)
    pool.check_integrity([[a, b], [a]])


def test_least_recently_used_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(4, 16)
    cached(pool, b"old1", b"old2")
    cached(pool, b"new1", b"new2")
    pool.release(pool.match([b"old1"]))  # used again: now the youngest
    gone = []
    for _ in range(4):
        pool.allocate(1)
        gone.append([name for name in (b"old1", b"old2", b"new1", b"new2") if pool.peek([name]) == 0])
    assert gone == [
        [b"old2"],
        [b"old2", b"new2"],
        [b"old2", b"new1", b"new2"],
        [b"old1", b"old2", b"new1", b"new2"],
    ]
    assert pool.stats.evictions == 4


def test_free_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(2, 16)
    cached(pool, b"a")
    pool.allocate(1)
    assert pool.peek([b"a"]) == 1


def test_register_keeps_the_first_of_a_name() -> None:
    pool = BlockPool(2, 16)
    first, second = pool.allocate(2)
    pool.register(first, b"a")
    pool.register(second, b"a")
    pool.register(first, b"a")
    assert (pool.is_shared(first), pool.is_shared(second)) == (True, False)
    pool.release([first, second])
    assert pool.match([b"a"]) == [first]
    pool.check_integrity([[first]])


def test_is_shared_by_references() -> None:
    pool = BlockPool(1, 16)
    blocks = pool.allocate(1)
    assert not pool.is_shared(blocks[0])
    pool.acquire(blocks)
    assert pool.is_shared(blocks[0])


def test_prefix_cache_off() -> None:
    pool = BlockPool(1, 16, prefix_cache=False)
    blocks = pool.allocate(1)
    pool.register(blocks[0], b"a")
    assert (pool.peek([b"a"]), pool.num_cached) == (0, 0)
    pool.release(blocks)
    assert pool.match([b"a"]) == []
    pool.check_integrity([])


def test_reset_forgets_names_but_not_holders() -> None:
    pool = BlockPool(3, 16)
    cached(pool, b"a", b"b")
    held = pool.match([b"a"])
    pool.reset_prefix_cache()
    assert (pool.num_cached, pool.num_free, pool.stats.evictable) == (0, 2, 0)
    assert pool.peek([b"a"]) == 0
    pool.check_integrity([held])
    pool.release(held)
    assert pool.num_free == 3


@pytest.mark.parametrize(
    "act",
    [
        lambda pool: pool.release([0]),
        lambda pool: pool.acquire([0]),
        lambda pool: pool.allocate(-1),
        lambda pool: pool.register(0, b"a"),
        lambda pool: (pool.register(pool.allocate(1)[0], b"a"), pool.register(0, b"b")),
    ],
)
def test_our_own_bugs_are_caught(act: Callable[[BlockPool], object]) -> None:
    with pytest.raises(InternalError):
        act(BlockPool(2, 16))


@pytest.mark.parametrize(("blocks", "size", "generations"), [(0, 1, None), (1, 0, None), (2, 1, [0]), (1, 1, [0, 0])])
def test_bad_sizes(blocks: int, size: int, generations: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"need at least|generations for"):
        BlockPool(blocks, size, generations=generations)


def _twice_free(pool: BlockPool) -> None:
    pool._free.append(pool._free[0])


def _negative(pool: BlockPool) -> None:
    pool._refs[pool._free[0]] = -1


def _two_states(pool: BlockPool) -> None:
    pool._refs[pool._free[0]] = 1


def _lost(pool: BlockPool) -> None:
    pool._free.pop()


def _index_differs(pool: BlockPool) -> None:
    pool._block_of[b"ghost"] = 0


def _named_free(pool: BlockPool) -> None:
    pool._hash_of[pool._free[0]] = b"f"
    pool._block_of[b"f"] = pool._free[0]


def _nameless_evictable(pool: BlockPool) -> None:
    pool._evictable[pool._free.pop()] = None


def _names_when_off(pool: BlockPool) -> None:
    pool.prefix_cache = False


def _alien_free(pool: BlockPool) -> None:
    pool._free.append(6)


def _alien_name(pool: BlockPool) -> None:
    pool._hash_of[-1] = b"f"
    pool._block_of[b"f"] = -1


def _leak(pool: BlockPool) -> None:
    pool.allocate(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_twice_free, "free list twice"),
        (_negative, "negative"),
        (_two_states, "two states"),
        (_lost, "lost blocks"),
        (_index_differs, "index and the blocks' names differ"),
        (_named_free, "free blocks in the index"),
        (_nameless_evictable, "without a name"),
        (_names_when_off, "prefix cache is off"),
        (_alien_free, "doesn't have: .6."),
        (_alien_name, "doesn't have: .-1."),
        (_leak, "references held"),
    ],
)
def test_check_integrity_sees_each_kind_of_damage(damage: Callable[[BlockPool], None], message: str) -> None:
    pool = BlockPool(6, 16)
    cached(pool, b"a")
    held = pool.allocate(2)
    pool.check_integrity([held])
    damage(pool)
    with pytest.raises(IntegrityError, match=message):
        pool.check_integrity([held])


@pytest.mark.parametrize("block", [-1, 6])
def test_check_integrity_sees_holders_of_blocks_that_are_not_there(block: int) -> None:
    """Even where a negative number would count as a block at the end, which somebody has."""
    pool = BlockPool(6, 16)
    held = pool.allocate(6)
    assert held[-1] == 5
    with pytest.raises(IntegrityError, match=f"holds block {block} of 6"):
        pool.check_integrity([*([b] for b in held[:-1]), [block]])


def test_the_least_recently_used_tail_goes_first() -> None:
    """Of two prompts with a common head: the one used longer ago loses its blocks, from its end on; the head last."""
    pool = BlockPool(5, 16)
    old, new = [b"head", b"old 1", b"old 2"], [b"head", b"new 1", b"new 2"]
    for names in (old, new):
        blocks = pool.match(names)
        blocks += pool.allocate(3 - len(blocks))
        for block, name in zip(blocks, names, strict=True):
            pool.register(block, name)
        pool.release(blocks)
    assert (pool.peek(old), pool.peek(new)) == (3, 3)
    for left in ((2, 3), (1, 3), (1, 2), (1, 1), (0, 0)):
        pool.allocate(1)
        assert (pool.peek(old), pool.peek(new)) == left
