"""The memory of a NIXL target that peers' blocks are read into.

Each pool is cut into descriptors at its first use, for as long as it is used. Memory is registered as a whole, once:
pools may be views of one, as those of the staging memory are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kv_transfer import segments
from kv_transfer.nixl_agent import LOCAL, NixlAgent
from kv_transfer.pool import PoolMemory
from kv_transfer.segments import Segment
from kv_transfer.unsettled import lent

MOST_POOLS = 16
"""Kept though nobody copies into them; more make room by leaving out the one used longest ago."""


@dataclass
class _Whole:
    """Registered memory."""

    owner: memoryview
    registered: Any
    pools: int = field(default=0)


@dataclass
class _Pool:
    """One destination pool as the agent knows it."""

    whole: Segment
    blocks: Any
    users: int = field(default=0)


class TargetMemory:
    """Destination pools of one agent. Thread-safe."""

    def __init__(self, agent: NixlAgent) -> None:
        """Registers nothing yet."""
        self._agent = agent
        self._lock = threading.Lock()
        self._wholes: dict[Segment, _Whole] = {}
        self._pools: dict[tuple[Segment, int], _Pool] = {}

    @contextmanager
    def blocks_of(self, pool: PoolMemory) -> Iterator[Any]:
        """Around reads into a pool: its blocks' descriptors. They stay until nothing can write there any more."""
        entry = self._take(pool)

        def leave() -> None:
            with self._lock:
                entry.users -= 1

        with lent(leave):
            yield entry.blocks

    def _take(self, pool: PoolMemory) -> _Pool:
        segment = segments.of_pool(pool)
        key = (segment, pool.block_bytes)
        with self._lock:
            entry = self._pools.pop(key, None)
            if entry is None:
                self._make_room()
                whole = self._register(pool, segment)
                entry = _Pool(whole, self._agent.prepare(LOCAL, segment, pool.block_bytes))
                self._wholes[whole].pools += 1
            self._pools[key] = entry  # the last one used is the last in the order
            entry.users += 1
            return entry

    def _register(self, pool: PoolMemory, segment: Segment) -> Segment:
        memory = segments.whole_of(pool)
        whole = segment if memory is None else segments.of_buffer(memory)
        if whole not in self._wholes:
            owner = pool.buffer if memory is None else memory
            self._wholes[whole] = _Whole(owner, self._agent.register(whole, owner))
        return whole

    def _make_room(self) -> None:
        idle = [key for key, entry in self._pools.items() if not entry.users]
        for key in idle[: max(0, len(self._pools) + 1 - MOST_POOLS)]:
            entry = self._pools.pop(key)
            self._agent.release(entry.blocks)
            whole = self._wholes[entry.whole]
            whole.pools -= 1
            if not whole.pools:
                del self._wholes[entry.whole]
                self._agent.deregister(whole.registered, whole.owner)

    def close(self) -> None:
        """Give the descriptors back."""
        with self._lock:
            for entry in self._pools.values():
                self._agent.release(entry.blocks)
            self._pools.clear()
