"""The memory of a NIXL target that peers' bytes are read into: pools of blocks, and room for generations.

Each is registered with the agent and cut into descriptors once: at its first use, for as long as it is used.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kv_transfer import segments
from kv_transfer.nixl_agent import LOCAL, NixlAgent
from kv_transfer.pool import PoolMemory
from kv_transfer.segments import Segment

MOST_POOLS = 16
"""Registered and idle; more make room by leaving out the one used longest ago."""
GENERATION_BYTES = 8
PAGE = 64
"""Generations that are read together: one small read costs as much as one of 512 bytes."""
_SLOTS, _SLOT_PAGES = 8, 64


@dataclass
class _Pool:
    """One destination pool as the agent knows it."""

    owner: PoolMemory
    registered: Any
    blocks: Any
    users: int = field(default=0)


class GenerationPages:
    """A peer's generations as descriptors of pages; the last page may overlap the one before it."""

    def __init__(self, agent: NixlAgent, peer: str, address: int, num_blocks: int) -> None:
        """`address` of the first generation in the peer's memory."""
        self._num_blocks = num_blocks
        self.size = min(PAGE, num_blocks)
        last = num_blocks - self.size
        starts = [*range(0, last, self.size), last]
        self.prepared = agent.prepare_pieces(
            peer,
            Segment(address, GENERATION_BYTES * num_blocks),
            [GENERATION_BYTES * start for start in starts],
            GENERATION_BYTES * self.size,
        )

    def place(self, block: int) -> tuple[int, int]:
        """Page of a block's generation, and where in the page it is."""
        page, last = block // self.size, self._num_blocks - self.size
        return page, block - min(page * self.size, last)


class TargetMemory:
    """Destination pools and scratch of one agent. Thread-safe."""

    def __init__(self, agent: NixlAgent) -> None:
        """Registers the scratch."""
        self._agent = agent
        self._lock = threading.Lock()
        self._pools: dict[tuple[Segment, int], _Pool] = {}
        self._scratch = np.zeros((_SLOTS, _SLOT_PAGES * PAGE), dtype=np.uint64)
        self._whole = segments.of_buffer(self._scratch.data.cast("B"))
        agent.register(self._whole, self._scratch)
        self._pages: dict[int, Any] = {}
        """Descriptors of the scratch by generations a page: pools smaller than a page have pages of their own size."""
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(_SLOTS):
            self._slots.put(slot)

    @contextmanager
    def blocks_of(self, pool: PoolMemory) -> Iterator[Any]:
        """Around reads into a pool: its blocks' descriptors."""
        entry = self._take(pool)
        try:
            yield entry.blocks
        finally:
            with self._lock:
                entry.users -= 1

    def _take(self, pool: PoolMemory) -> _Pool:
        segment = segments.of_pool(pool)
        key = (segment, pool.block_bytes)
        with self._lock:
            entry = self._pools.pop(key, None)
            if entry is None:
                self._make_room()
                registered = self._agent.register(segment, pool.buffer)
                entry = _Pool(pool, registered, self._agent.prepare(LOCAL, segment, pool.block_bytes))
            self._pools[key] = entry  # the last one used is the last in the order
            entry.users += 1
            return entry

    def _make_room(self) -> None:
        idle = [key for key, entry in self._pools.items() if not entry.users]
        for key in idle[: max(0, len(self._pools) + 1 - MOST_POOLS)]:
            entry = self._pools.pop(key)
            self._agent.release(entry.blocks)
            self._agent.deregister(entry.registered, entry.owner.buffer)

    def read_generations(self, pages: GenerationPages, blocks: Sequence[int]) -> list[int]:
        """A peer's generations of `blocks`, now. Raises UnavailableError."""
        places = [pages.place(block) for block in blocks]
        wanted = sorted({page for page, _ in places})
        read: dict[int, list[int]] = {}
        slot = self._slots.get()
        try:
            for at in range(0, len(wanted), _SLOT_PAGES):
                read |= self._read_pages(pages, wanted[at : at + _SLOT_PAGES], slot)
        finally:
            self._slots.put(slot)
        return [read[page][at] for page, at in places]

    def _read_pages(self, pages: GenerationPages, wanted: Sequence[int], slot: int) -> dict[int, list[int]]:
        """At most `_SLOT_PAGES` pages, by number."""
        a_row = _SLOT_PAGES * PAGE // pages.size
        first = slot * a_row
        into = range(first, first + len(wanted))
        self._agent.wait(self._agent.read(self._scratch_pages(pages.size), into, pages.prepared, wanted))
        held = self._scratch[slot, : len(wanted) * pages.size].reshape(-1, pages.size).tolist()
        return dict(zip(wanted, held, strict=True))

    def _scratch_pages(self, size: int) -> Any:
        """Descriptors of all slots, cut into pages of `size` generations; no page lies across two slots."""
        with self._lock:
            if size not in self._pages:
                row, page = self._scratch.shape[1] * GENERATION_BYTES, size * GENERATION_BYTES
                starts = [slot * row + at * page for slot in range(_SLOTS) for at in range(row // page)]
                self._pages[size] = self._agent.prepare_pieces(LOCAL, self._whole, starts, page)
            return self._pages[size]

    def close(self) -> None:
        """Give the descriptors back; no read may be under way."""
        with self._lock:
            for entry in self._pools.values():
                self._agent.release(entry.blocks)
            self._pools.clear()
            for prepared in self._pages.values():
                self._agent.release(prepared)
            self._pages.clear()
