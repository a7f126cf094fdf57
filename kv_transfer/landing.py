"""How an offer's blocks get into the reader's pool: as they are, or by way of staging memory where layouts differ.

Unlike blocks come in pieces: copied into a staging slot under every check that a direct copy has (generations before
and after, CRC-32), then converted into the reader's blocks. So what a check refuses is never converted, and what was
converted still waits for the commit, which checks the generations of all offers once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kv_transfer.conversion import convert
from kv_transfer.messages import Offer
from kv_transfer.plan import Piece, TransferPlan
from kv_transfer.pool import PoolMemory
from kv_transfer.ranks import RankViews, offer_of_rank
from kv_transfer.staging import StagingPool
from tandem.errors import InvalidRequestError
from tandem.kv_layout import KvLayout, staged_bytes

PIECE_BYTES = 1 << 20
"""Of the sender's blocks, about what is staged at once: it should still be in the CPU's cache when it is converted."""


class Landing:
    """For one transfer. Thread-safe: every reader's block comes whole in one offer, so copies don't meet."""

    def __init__(self, plan: TransferPlan, pools: Sequence[PoolMemory], staging: StagingPool) -> None:
        """`pools` are the reader's, one a rank."""
        self._plan = plan
        self._pools = tuple(pools)
        self._staging = staging

    def land(self, views: RankViews, offer: Offer, target_blocks: Sequence[int], stop: Callable[[], bool]) -> None:
        """Bring an offer's tokens into `target_blocks`. Blocking; raises what `SourceView.copy` raises."""
        plan = self._plan
        _check_payload(offer, plan.source)
        if plan.direct:
            for rank, view in enumerate(views.ranks):
                view.copy(self._of_rank(offer, rank), self._pools[rank], target_blocks, stop)
            return
        most = max(PIECE_BYTES, staged_bytes(plan.source, plan.target))
        blocks = most // plan.source.block_bytes
        with self._staging.slot(blocks, plan.source.block_bytes) as slot:
            for rank, view in enumerate(views.ranks):
                of_rank = self._of_rank(offer, rank)
                for piece in plan.pieces(offer.token_start, offer.token_end, most):
                    view.copy(_part_of(of_rank, piece, plan), slot, range(piece.source_blocks), stop)
                    self._convert(piece, rank, slot, target_blocks, offer.token_start)

    def _of_rank(self, offer: Offer, rank: int) -> Offer:
        source = self._plan.source
        return offer if source.tp_size == 1 else offer_of_rank(offer, rank, source.block_bytes)

    def _convert(
        self, piece: Piece, source_rank: int, slot: PoolMemory, target_blocks: Sequence[int], token_start: int
    ) -> None:
        """A piece of one of the sender's ranks, into whichever of the reader's ranks have its heads."""
        plan = self._plan
        first = piece.target_block - token_start // plan.target.block_size
        into = target_blocks[first : first + piece.target_blocks]
        staged = slot.buffer[: piece.source_blocks * plan.source.block_bytes]
        for pool, runs in zip(self._pools, plan.heads, strict=True):
            for run in runs:
                if run.source_rank == source_rank:
                    convert(plan, piece, run, staged, pool.buffer, into)


def _part_of(offer: Offer, piece: Piece, plan: TransferPlan) -> Offer:
    """The offer of a piece's blocks alone."""
    first, size = piece.source_block - offer.token_start // plan.source.block_size, plan.source.block_bytes
    part = slice(first, first + piece.source_blocks)
    return replace(
        offer,
        token_start=piece.start,
        token_end=piece.end,
        blocks=offer.blocks[part],
        generations=offer.generations[part],
        payload=offer.payload[part.start * size : part.stop * size],
        checksums=offer.checksums[part],
    )


def _check_payload(offer: Offer, source: KvLayout) -> None:
    """What the copy of one piece or rank can't see: bytes or checksums behind those of all blocks."""
    count = len(offer.blocks) * source.tp_size
    if len(offer.payload) > count * source.block_bytes or len(offer.checksums) > count:
        raise InvalidRequestError(
            f"{len(offer.payload)} bytes and {len(offer.checksums)} checksums for {count} blocks of "
            f"{source.block_bytes} bytes",
            field="offer.payload",
        )
