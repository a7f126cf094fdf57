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
_SLOTS, _SLOT_GENERATIONS = 8, 1024


@dataclass
class _Pool:
    """One destination pool as the agent knows it."""

    owner: PoolMemory
    registered: Any
    blocks: Any
    users: int = field(default=0)


class TargetMemory:
    """Destination pools and scratch of one agent. Thread-safe."""

    def __init__(self, agent: NixlAgent) -> None:
        """Registers the scratch."""
        self._agent = agent
        self._lock = threading.Lock()
        self._pools: dict[tuple[Segment, int], _Pool] = {}
        self._scratch = np.zeros((_SLOTS, _SLOT_GENERATIONS), dtype=np.uint64)
        whole = segments.of_buffer(self._scratch.data.cast("B"))
        agent.register(whole, self._scratch)
        self._pieces = agent.prepare(LOCAL, whole, GENERATION_BYTES)
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

    def read_generations(self, generations: Any, blocks: Sequence[int]) -> list[int]:
        """A peer's generations of `blocks`, now; `generations` are its descriptors. Raises UnavailableError."""
        read: list[int] = []
        slot = self._slots.get()
        try:
            for at in range(0, len(blocks), _SLOT_GENERATIONS):
                wanted = blocks[at : at + _SLOT_GENERATIONS]
                first = slot * _SLOT_GENERATIONS
                self._agent.wait(self._agent.read(self._pieces, range(first, first + len(wanted)), generations, wanted))
                read.extend(self._scratch[slot, : len(wanted)].tolist())
        finally:
            self._slots.put(slot)
        return read

    def close(self) -> None:
        """Give the descriptors back; no read may be under way."""
        with self._lock:
            for entry in self._pools.values():
                self._agent.release(entry.blocks)
            self._pools.clear()
            self._agent.release(self._pieces)
