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
from kv_transfer.staging import StagingPool
from kv_transfer.transport import SourceView
from tandem.errors import InvalidRequestError
from tandem.kv_layout import staged_bytes

PIECE_BYTES = 1 << 20
"""Of the sender's blocks, about what is staged at once: it should still be in the CPU's cache when it is converted."""


class Landing:
    """For one transfer. Thread-safe: every reader's block comes whole in one offer, so copies don't meet."""

    def __init__(self, plan: TransferPlan, pool: PoolMemory, staging: StagingPool) -> None:
        """`pool` is the reader's."""
        self._plan = plan
        self._pool = pool
        self._staging = staging

    def land(self, view: SourceView, offer: Offer, target_blocks: Sequence[int], stop: Callable[[], bool]) -> None:
        """Bring an offer's tokens into `target_blocks`. Blocking; raises what `SourceView.copy` raises."""
        if self._plan.direct:
            view.copy(offer, self._pool, target_blocks, stop)
            return
        _check_payload(offer, self._plan.source.block_bytes)
        block_bytes = self._plan.source.block_bytes
        most = max(PIECE_BYTES, staged_bytes(self._plan.source, self._plan.target), block_bytes)
        with self._staging.slot(most // block_bytes, block_bytes) as slot:
            for piece in self._plan.pieces(offer.token_start, offer.token_end, most):
                self._land_piece(view, offer, piece, target_blocks, slot, stop)

    def _land_piece(
        self,
        view: SourceView,
        offer: Offer,
        piece: Piece,
        target_blocks: Sequence[int],
        slot: PoolMemory,
        stop: Callable[[], bool],
    ) -> None:
        plan = self._plan
        first = piece.target_block - offer.token_start // plan.target.block_size
        into = target_blocks[first : first + piece.target_blocks]
        view.copy(_part_of(offer, piece, plan), slot, range(piece.source_blocks), stop)
        staged = slot.buffer[: piece.source_blocks * plan.source.block_bytes]
        for run in plan.heads[0]:
            convert(plan, piece, run, staged, self._pool.buffer, into)


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


def _check_payload(offer: Offer, block_bytes: int) -> None:
    """What a piece's own copy can't see: bytes or checksums behind those of all blocks."""
    count = len(offer.blocks)
    if len(offer.payload) > count * block_bytes or len(offer.checksums) > count:
        raise InvalidRequestError(
            f"{len(offer.payload)} bytes and {len(offer.checksums)} checksums for {count} blocks of {block_bytes}",
            field="offer.payload",
        )
