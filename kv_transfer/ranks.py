"""Both ends of a transfer between workers with tensor parallelism: one pool and one end of a transport for each rank.

A worker's ranks share one scheduler, so a block id means the same tokens in every rank's pool, and one offer speaks of
the blocks of all. What differs by rank travels rank after rank: endpoints (`join_endpoints`), and, where bytes ride in
the stream, payload and checksums. `TransferPlan.heads` says which of them a rank of the receiver reads.

A worker's ranks run on one machine, and rank 0's process maps the pools of all (`worker.pools`): it has both ends, and
copies for all.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

from kv_transfer.messages import Offer
from kv_transfer.pool import PoolMemory
from kv_transfer.transport import SourceTransport, SourceView, TargetTransport
from tandem.errors import InternalError, InvalidRequestError
from tandem.kv_layout import KvLayout

_LENGTH = struct.Struct("<I")


class RankedSource:
    """The sender's end over all its ranks, in the order of their heads; a `SourceTransport`."""

    def __init__(self, sources: Sequence[SourceTransport]) -> None:
        """One a rank, of one transport. They become this one's."""
        if len({source.name for source in sources}) != 1:
            raise InternalError(f"one transport for all ranks is needed, got {[source.name for source in sources]}")
        self._sources = tuple(sources)
        self.name = sources[0].name
        self.pool: PoolMemory = sources[0].pool
        self.max_offer_bytes = sources[0].max_offer_bytes // len(sources)
        """Of each rank."""

    def endpoint(self) -> bytes:
        """Every rank's."""
        return join_endpoints([source.endpoint() for source in self._sources])

    def offer_payload(self, blocks: Sequence[int]) -> tuple[bytes, tuple[int, ...]]:
        """Every rank's bytes, and every rank's checksums, one rank after another."""
        parts = [source.offer_payload(blocks) for source in self._sources]
        return b"".join(payload for payload, _ in parts), tuple(number for _, sums in parts for number in sums)

    def close(self) -> None:
        """Every rank's end. Idempotent."""
        for source in self._sources:
            source.close()


class RankedGenerations:
    """The generations of all ranks' blocks as one sequence for the block pool that rules them.

    A block's generation goes up in every rank before the block is handed out, whichever rank a late reader looks at.
    """

    def __init__(self, pools: Sequence[PoolMemory]) -> None:
        """One pool a rank."""
        self._ranks = [pool.generations for pool in pools]

    def __len__(self) -> int:
        """Blocks."""
        return len(self._ranks[0])

    def __getitem__(self, block: int) -> int:
        """One block's."""
        return self._ranks[0][block]

    def __setitem__(self, block: int, generation: int) -> None:
        """In every rank."""
        for rank in self._ranks:
            rank[block] = generation


class RankViews:
    """The receiver's views of every rank of one sender. Thread-safe."""

    def __init__(self, ranks: Sequence[SourceView]) -> None:
        """In the order of the sender's ranks."""
        self.ranks = tuple(ranks)

    def verify(self, offer: Offer) -> None:
        """See `SourceView.verify`: no rank's block may have been handed out again."""
        for view in self.ranks:
            view.verify(offer)

    def close(self) -> None:
        """See `SourceView.close`."""
        for view in self.ranks:
            view.close()


def connect_ranks(transport: TargetTransport, endpoint: bytes, source_incarnation: str, layout: KvLayout) -> RankViews:
    """Find the pools of all of a sender's ranks. Raises what `TargetTransport.connect` raises, and then holds none."""
    views: list[SourceView] = []
    try:
        for one in split_endpoint(endpoint, layout.tp_size):
            views.append(transport.connect(one, source_incarnation, layout))
    except BaseException:
        RankViews(views).close()
        raise
    return RankViews(views)


def claims_of(transport: TargetTransport, endpoint: bytes, layout: KvLayout) -> list[bytes]:
    """What of the endpoints of all of a sender's ranks belongs to nobody else. Raises InvalidRequestError."""
    return [claim for one in split_endpoint(endpoint, layout.tp_size) for claim in transport.claims(one)]


def join_endpoints(endpoints: Sequence[bytes]) -> bytes:
    """One rank's endpoint stays as it is; several are told apart by their lengths."""
    if len(endpoints) == 1:
        return endpoints[0]
    return b"".join(_LENGTH.pack(len(endpoint)) + endpoint for endpoint in endpoints)


def split_endpoint(endpoint: bytes, ranks: int) -> list[bytes]:
    """The inverse of `join_endpoints`. Raises InvalidRequestError unless it holds exactly so many."""
    if ranks == 1:
        return [endpoint]
    found: list[bytes] = []
    at = 0
    while at + _LENGTH.size <= len(endpoint) and len(found) < ranks:
        (length,) = _LENGTH.unpack_from(endpoint, at)
        at += _LENGTH.size + length
        found.append(endpoint[at - length : at])
    if len(found) != ranks or at != len(endpoint):
        raise InvalidRequestError(f"the endpoint doesn't hold those of {ranks} ranks", field="open.endpoint")
    return found


def offer_of_rank(offer: Offer, rank: int, block_bytes: int) -> Offer:
    """What an offer says of one of the sender's ranks."""
    count = len(offer.blocks)
    return replace(
        offer,
        payload=offer.payload[rank * count * block_bytes : (rank + 1) * count * block_bytes],
        checksums=offer.checksums[rank * count : (rank + 1) * count],
    )
