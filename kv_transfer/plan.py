"""Which bytes go where between two pools that aren't alike. Stateless, and made once a pair of layouts.

Tokens decide: position t is slot t % S of the sender's block t // S, and slot t % R of the reader's block t // R,
whatever S and R are. Heads decide between ranks: every rank holds a run of the model's KV heads, so each of the
reader's ranks takes runs of heads from one or more of the sender's ranks (`TransferPlan.heads[rank]`); nothing else of
the plan depends on the rank.

Room for what isn't built: a push by layers would cut `Piece`s along the layer axis as well, since elements of one layer
are contiguous in a block; fetching a prefix from another worker is the same plan with the sides exchanged, and so is a
worker that changes its role: no part of it knows which side computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tandem.kv_layout import KvLayout


@dataclass(frozen=True, slots=True)
class HeadRun:
    """`count` heads that lie side by side on both ends."""

    source_rank: int
    source_head: int
    """Of the source rank's own heads, the first."""
    target_head: int
    """Of the target rank's own heads, the first."""
    count: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, end) that are brought over at once: whole blocks of the reader, the last perhaps in part."""

    start: int
    end: int
    source_block: int
    """Of the sender's blocks, counted from token 0, the first."""
    source_blocks: int
    target_block: int
    """Of the reader's blocks, counted from token 0, the first."""
    target_blocks: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive tokens within one block on both ends; blocks count from those of the piece."""

    source_block: int
    source_slot: int
    target_block: int
    target_slot: int
    count: int


@dataclass(frozen=True)
class TransferPlan:
    """How blocks of layout `source` become blocks of layout `target`, which `can_pair` has said that they can."""

    source: KvLayout
    target: KvLayout
    heads: tuple[tuple[HeadRun, ...], ...]
    """For each of the reader's ranks, in the order of its heads."""

    @property
    def direct(self) -> bool:
        """True when blocks are copied as they are."""
        return self.source == self.target

    def source_span(self, start: int, end: int) -> range:
        """The sender's blocks, counted from token 0, that hold tokens [start, end)."""
        return range(start // self.source.block_size, self.source.blocks_for(end))

    def pieces(self, start: int, end: int, most_bytes: int) -> Iterator[Piece]:
        """Cut tokens [start, end) so that a piece needs at most `most_bytes` of the sender's blocks, or one block of
        the reader. `start` is at one of the reader's block boundaries.
        """
        most_blocks, size, step = most_bytes // self.source.block_bytes, self.source.block_size, self.target.block_size
        while start < end:
            fitting = (start // size + most_blocks) * size // step * step
            stop = min(end, max(fitting, start + step))
            span = self.source_span(start, stop)
            yield Piece(start, stop, span.start, len(span), start // step, self.target.blocks_for(stop) - start // step)
            start = stop

    def stretches(self, piece: Piece) -> Iterator[Stretch]:
        """The piece's tokens, cut wherever a block of either end ends."""
        size, step, at = self.source.block_size, self.target.block_size, piece.start
        while at < piece.end:
            count = min(size - at % size, step - at % step, piece.end - at)
            yield Stretch(at // size - piece.source_block, at % size, at // step - piece.target_block, at % step, count)
            at += count


@lru_cache(maxsize=256)
def plan_transfer(source: KvLayout, target: KvLayout) -> TransferPlan:
    """The plan for a pair; the same object for the same pair."""
    heads = tuple(_runs(source.num_kv_heads, target.num_kv_heads, rank) for rank in range(target.tp_size))
    return TransferPlan(source, target, heads)


def _runs(source_heads: int, target_heads: int, rank: int) -> tuple[HeadRun, ...]:
    """Where heads [rank * target_heads, (rank + 1) * target_heads) of the model lie among the sender's ranks."""
    runs: list[HeadRun] = []
    at, end = rank * target_heads, (rank + 1) * target_heads
    while at < end:
        count = min(source_heads - at % source_heads, end - at)
        runs.append(HeadRun(at // source_heads, at % source_heads, at - rank * target_heads, count))
        at += count
    return tuple(runs)
