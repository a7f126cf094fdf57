"""Transport within one process: the reader looks straight into the sender's pool. For tests, as the fake of the others.

Life: `MemorySource(...)` enters a table of this process under a random endpoint -> `close()` takes it out.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence

from kv_transfer.copying import check_generations, copy_blocks
from kv_transfer.messages import Offer
from kv_transfer.pool import PoolMemory
from kv_transfer.transport import never
from tandem.errors import IncompatibleError, InvalidRequestError, StaleError, UnavailableError
from tandem.kv_layout import KvLayout

_ENDPOINT_BYTES = 16
_sources: dict[bytes, MemorySource] = {}
_lock = threading.Lock()


class MemorySource:
    """The sender's end."""

    name = "memory"
    max_offer_bytes = 64 << 20

    def __init__(self, pool: PoolMemory, incarnation: str) -> None:
        """Enter the table."""
        self.pool = pool
        self.incarnation = incarnation
        self._endpoint = secrets.token_bytes(_ENDPOINT_BYTES)
        with _lock:
            _sources[self._endpoint] = self

    def endpoint(self) -> bytes:
        """16 random bytes."""
        return self._endpoint

    def offer_payload(self, blocks: Sequence[int]) -> tuple[bytes, tuple[int, ...]]:
        """Nothing rides in the stream."""
        return b"", ()

    def close(self) -> None:
        """Leave the table."""
        with _lock:
            _sources.pop(self._endpoint, None)


class PoolReader:
    """A SourceView over memory that this process can see.

    The memory stays valid while the view or a copy refers to it.
    """

    def __init__(self, pool: PoolMemory) -> None:
        """`pool` is the sender's."""
        self._pool: PoolMemory | None = pool

    def copy(
        self, offer: Offer, target_pool: PoolMemory, target_blocks: Sequence[int], stop: Callable[[], bool] = never
    ) -> None:
        """See `SourceView.copy`."""
        copy_blocks(offer, self._require_pool(), target_pool, target_blocks, stop)

    def verify(self, offer: Offer) -> None:
        """See `SourceView.verify`."""
        check_generations(offer, self._require_pool())

    def close(self) -> None:
        """Drop the reference; a copy in flight holds its own."""
        self._pool = None

    def _require_pool(self) -> PoolMemory:
        pool = self._pool
        if pool is None:
            raise StaleError("the transfer is closed", reason="TRANSFER_OVER")
        return pool


class MemoryTarget:
    """The receiver's end."""

    name = "memory"
    side_by_side = True

    def claims(self, endpoint: bytes) -> tuple[bytes, ...]:
        """None beside the whole."""
        return ()

    def connect(self, endpoint: bytes, source_incarnation: str, layout: KvLayout) -> PoolReader:
        """See `TargetTransport.connect`."""
        if len(endpoint) != _ENDPOINT_BYTES:
            raise InvalidRequestError(f"an endpoint has {_ENDPOINT_BYTES} bytes", field="open.endpoint")
        with _lock:
            source = _sources.get(endpoint)
        if source is None:
            raise UnavailableError("no sender at this endpoint", reason="SOURCE_GONE")
        if source.incarnation != source_incarnation:
            raise StaleError("another incarnation of the sender is there", reason="STALE_INCARNATION")
        if source.pool.block_bytes != layout.block_bytes:
            raise IncompatibleError(f"the sender's pool has blocks of {source.pool.block_bytes} bytes, not {layout}")
        return PoolReader(source.pool)

    def close(self) -> None:
        """Nothing is kept."""
