"""Transport for any network: the blocks' bytes ride in the transfer stream, each under a CRC-32.

(The stream is the servicers'.)

Stateless: `endpoint()` is empty, a view checks and copies what the offer itself brings.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from kv_transfer.copying import copy_payload
from kv_transfer.messages import Offer
from kv_transfer.pool import PoolMemory
from kv_transfer.transport import never
from tandem.errors import InvalidRequestError, StaleError
from tandem.kv_layout import KvLayout


class GrpcSource:
    """The sender's end."""

    name = "grpc"
    max_offer_bytes = 2 << 20
    """Far below the 64 MiB of a message, and short enough to let other streams' frames pass between."""

    def __init__(self, pool: PoolMemory, incarnation: str) -> None:
        """`incarnation` travels in Open, not here."""
        self.pool = pool
        self.incarnation = incarnation

    def endpoint(self) -> bytes:
        """Empty."""
        return b""

    def offer_payload(self, blocks: Sequence[int]) -> tuple[bytes, tuple[int, ...]]:
        """The blocks' bytes and CRC-32s.

        One copy: protobuf wants `bytes`, so they are joined straight from the pool.
        """
        size, pool = self.pool.block_bytes, self.pool.buffer
        payload = b"".join(pool[block * size : (block + 1) * size] for block in blocks)
        view = memoryview(payload)
        return payload, tuple(zlib.crc32(view[at : at + size]) for at in range(0, len(payload), size))

    def close(self) -> None:
        """Nothing is held."""


class PayloadReader:
    """A SourceView that reads the offers themselves.

    A held block can't change under it, so `verify` has nothing to ask.
    """

    def __init__(self, block_bytes: int) -> None:
        """`block_bytes` of the layout."""
        self._block_bytes = block_bytes
        self._closed = False

    def copy(
        self, offer: Offer, target_pool: PoolMemory, target_blocks: Sequence[int], stop: Callable[[], bool] = never
    ) -> None:
        """See `SourceView.copy`."""
        self.verify(offer)
        copy_payload(offer, self._block_bytes, target_pool, target_blocks, stop)

    def verify(self, offer: Offer) -> None:
        """The sender checked generations when it joined the bytes: here only that the view is open."""
        if self._closed:
            raise StaleError("the transfer is closed", reason="TRANSFER_OVER")

    def close(self) -> None:
        """See `SourceView.close`."""
        self._closed = True


class GrpcTarget:
    """The receiver's end."""

    name = "grpc"
    side_by_side = True

    def claims(self, endpoint: bytes) -> tuple[bytes, ...]:
        """There is no endpoint."""
        return ()

    def connect(self, endpoint: bytes, source_incarnation: str, layout: KvLayout) -> PayloadReader:
        """See `TargetTransport.connect`; there is nowhere to connect to."""
        if endpoint:
            raise InvalidRequestError("this transport has no endpoint", field="open.endpoint")
        return PayloadReader(layout.block_bytes)

    def close(self) -> None:
        """Nothing is held."""
