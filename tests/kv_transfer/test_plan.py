from __future__ import annotations

from dataclasses import replace

import pytest

from kv_transfer.plan import HeadRun, plan_transfer
from tandem.kv_layout import KvLayout, staged_bytes

LAYOUT = KvLayout(block_size=16, dtype="float32", num_layers=2, num_kv_heads=8, head_dim=4)


def test_a_pair_is_planned_once() -> None:
    other = replace(LAYOUT, block_size=24)
    plan = plan_transfer(LAYOUT, other)
    assert plan_transfer(replace(LAYOUT), replace(other)) is plan
    assert not plan.direct
    assert plan_transfer(LAYOUT, LAYOUT).direct


@pytest.mark.parametrize(
    ("source", "target", "heads"),
    [
        (1, 1, (((0, 0, 0, 6),),)),
        (2, 1, (((0, 0, 0, 3), (1, 0, 3, 3)),)),
        (1, 2, (((0, 0, 0, 3),), ((0, 3, 0, 3),))),
        (3, 3, (((0, 0, 0, 2),), ((1, 0, 0, 2),), ((2, 0, 0, 2),))),
        (2, 3, (((0, 0, 0, 2),), ((0, 2, 0, 1), (1, 0, 1, 1)), ((1, 1, 0, 2),))),
        (3, 2, (((0, 0, 0, 2), (1, 0, 2, 1)), ((1, 1, 0, 1), (2, 0, 1, 2)))),
    ],
)
def test_each_rank_knows_whose_heads_are_its_own(source: int, target: int, heads: tuple) -> None:
    def layout(ranks: int) -> KvLayout:
        return replace(LAYOUT, num_kv_heads=6 // ranks, tp_size=ranks)

    plan = plan_transfer(layout(source), layout(target))
    assert plan.heads == tuple(tuple(HeadRun(*run) for run in rank) for rank in heads)


@pytest.mark.parametrize("size", [1, 7, 16, 24, 32])
@pytest.mark.parametrize("step", [1, 5, 16, 24, 32])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_every_token_comes_exactly_once_and_in_bounds(size: int, step: int, most: int) -> None:
    source, target = replace(LAYOUT, block_size=size), replace(LAYOUT, block_size=step)
    plan = plan_transfer(source, target)
    start, end = 2 * step, 2 * step + 77
    reached = start
    for piece in plan.pieces(start, end, most * source.block_bytes):
        assert piece.start == reached
        assert piece.start % step == 0
        assert piece.end % step == 0 or piece.end == end
        assert piece.source_blocks * source.block_bytes <= max(most * source.block_bytes, staged_bytes(source, target))
        assert (piece.source_block, piece.target_block) == (piece.start // size, piece.start // step)
        tokens = []
        for part in plan.stretches(piece):
            assert part.source_block < piece.source_blocks
            assert part.target_block < piece.target_blocks
            assert part.source_slot + part.count <= size
            assert part.target_slot + part.count <= step
            first = (piece.source_block + part.source_block) * size + part.source_slot
            assert first == (piece.target_block + part.target_block) * step + part.target_slot
            tokens += range(first, first + part.count)
        assert tokens == list(range(piece.start, piece.end))
        reached = piece.end
    assert reached == end
