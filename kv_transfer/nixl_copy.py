"""One copy over NIXL: pieces of an offer are read ahead, and what has arrived is checked meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from kv_transfer.copying import check_stop, checksums, stale_block
from kv_transfer.messages import Offer
from kv_transfer.nixl_agent import Posted
from kv_transfer.nixl_peer import Peer
from kv_transfer.pool import PoolMemory

PIECE_BYTES = 4 << 20
"""Most bytes a read: within one machine they are copied while it is posted, so `stop` waits for a millisecond."""
READS_AHEAD = 4
"""Pieces posted at once by one copy."""


def check_generations(peer: Peer, offer: Offer) -> None:
    """Every offered block is still the one that was offered (else StaleError)."""
    held = peer.generations.read(offer.blocks)
    for block, now, then in zip(offer.blocks, held, offer.generations, strict=True):
        if now != then:
            raise stale_block(block)


def read_blocks(
    peer: Peer,
    offer: Offer,
    into: Any,
    pool: PoolMemory,
    pool_blocks: Sequence[int],
    stop: Callable[[], bool],
    checking: Executor,
) -> int | None:
    """The first block, by its place in the offer, that has another checksum.

    A few pieces ahead of the one that is waited for. In the end all that was posted is over, or left to the peer.
    Checksums of a piece are taken in a thread while the next is read; those of the last one here.
    """
    step = max(1, PIECE_BYTES // peer.block_bytes)
    starts = range(0, len(offer.blocks), step)
    posted: deque[Posted] = deque()
    checks: list[Future[int | None]] = []

    def arrive() -> int | None:
        start = starts[len(checks)]
        peer.reads.wait(posted.popleft())
        places = range(start, min(start + step, len(offer.blocks)))
        if start == starts[-1]:
            return _first_corrupt(offer, pool, pool_blocks, places)
        checks.append(checking.submit(_first_corrupt, offer, pool, pool_blocks, places))
        return None

    last = None
    try:
        for at in starts:
            check_stop(stop)
            posted.append(peer.reads.post(into, pool_blocks[at : at + step], peer.blocks, offer.blocks[at : at + step]))
            if len(posted) == READS_AHEAD:
                last = arrive()
        while posted:
            last = arrive()
    finally:
        peer.reads.finish(posted)
    return next((place for place in (*(check.result() for check in checks), last) if place is not None), None)


def _first_corrupt(offer: Offer, pool: PoolMemory, pool_blocks: Sequence[int], places: range) -> int | None:
    sums = checksums(pool, [pool_blocks[place] for place in places])
    return next((place for place, now in zip(places, sums, strict=True) if now != offer.checksums[place]), None)
