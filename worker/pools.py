"""The memory of a worker's KV blocks, where transfers or other ranks share it. Torch-free.

With several ranks (`engine.parallel`) rank 0 makes every rank's pool and keeps a map of each, for transfers and block
generations; each other rank writes its own through a map that rank 0 lends it while both load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kv_transfer.pool import LocalPool, PoolMemory, SharedPool, map_lent


class Lenders(Protocol):
    """As `engine.parallel.group.Ranks`."""

    @property
    def leads(self) -> bool: ...
    @property
    def size(self) -> int: ...
    def lend(self, rank: int, fd: int) -> None: ...
    def borrow(self, take: Callable[[int], memoryview]) -> memoryview: ...


class Pools:
    """Life cycle: made -> `make` once, when the engine knows its sizes -> `all`, on rank 0."""

    def __init__(self, ranks: Lenders | None = None, *, shared: bool = False) -> None:
        """`shared`: rank 0's own pool can be read by other processes, too."""
        self._ranks, self._shared = ranks, shared
        self.all: list[PoolMemory] = []
        """One a rank. Empty on other ranks than 0."""

    def make(self, num_blocks: int, block_bytes: int) -> memoryview:
        """This rank's blocks, writable: an `engine.loading.BufferFactory`. Raises ConfigError."""
        ranks = self._ranks
        if ranks is not None and not ranks.leads:
            return ranks.borrow(lambda fd: map_lent(fd, num_blocks, block_bytes))
        own = SharedPool if self._shared else LocalPool
        self.all = [own(num_blocks, block_bytes)]
        for rank in range(1, ranks.size if ranks is not None else 1):
            self.all.append(SharedPool(num_blocks, block_bytes, _lender(ranks, rank)))
        return self.all[0].buffer


def _lender(ranks: Lenders | None, rank: int) -> Callable[[int], None]:
    assert ranks is not None
    return lambda fd: ranks.lend(rank, fd)
