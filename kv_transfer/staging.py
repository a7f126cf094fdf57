"""Memory of the reader for blocks that aren't in its own layout, between their copy and their conversion.

Life: made by the receiver -> the first `slot` reserves the memory -> a copy holds one slot at a time. Bounded: no more
copies run than there are slots, and a slot takes `STAGING_SLOT_BYTES` at most; pages are the machine's until touched.
Each slot is a pool of its own, the same object for the same pair of layouts, so a transport can register it as it
registers any pool that it copies into.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kv_transfer.pool import LocalPool, PoolMemory, PoolView
from kv_transfer.unsettled import lent
from tandem.errors import UnavailableError
from tandem.kv_layout import STAGING_SLOT_BYTES

COPY_THREADS = 4
"""Of a receiver, and as many slots: one more copy waits for a slot."""
SLOT_WAIT_SECONDS = 5.0
"""A slot is held for a copy of some milliseconds, or kept from everybody after a sender that hung."""
_MOST_VIEWS = 64


class StagingPool:
    """Slots of memory. Thread-safe."""

    def __init__(self, slots: int = COPY_THREADS) -> None:
        """Reserves nothing yet."""
        self._lock = threading.Lock()
        self._memory: LocalPool | None = None
        self._slots = slots
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)
        self._views: dict[tuple[int, int, int], PoolView] = {}

    @property
    def idle(self) -> bool:
        """True when nobody holds a slot."""
        return self._free.qsize() == self._slots

    @contextmanager
    def slot(self, num_blocks: int, block_bytes: int) -> Iterator[PoolMemory]:
        """Hold a pool of so many blocks, at most `STAGING_SLOT_BYTES`; waits for one. What was in it is undefined.

        It stays held while a copy that failed may still write it. Raises UnavailableError when none becomes free.
        """
        try:
            slot = self._free.get(timeout=SLOT_WAIT_SECONDS)
        except queue.Empty:
            raise UnavailableError("no room to convert KV: other copies don't end", reason="STAGING_BUSY") from None
        with lent(lambda: self._free.put(slot)):
            yield self._view(slot, num_blocks, block_bytes)

    def _view(self, slot: int, num_blocks: int, block_bytes: int) -> PoolView:
        assert num_blocks * block_bytes <= STAGING_SLOT_BYTES
        key = (slot, num_blocks, block_bytes)
        with self._lock:
            if key not in self._views:
                if len(self._views) >= _MOST_VIEWS:
                    del self._views[next(iter(self._views))]
                if self._memory is None:
                    self._memory = LocalPool(self._slots, STAGING_SLOT_BYTES)
                start = slot * STAGING_SLOT_BYTES
                buffer = self._memory.buffer[start : start + num_blocks * block_bytes]
                generations = memoryview(bytearray(8 * num_blocks)).cast("Q")
                self._views[key] = PoolView(buffer, block_bytes, num_blocks, generations, whole=self._memory.buffer)
            return self._views[key]
