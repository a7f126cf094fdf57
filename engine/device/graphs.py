"""Captured graphs behind one interface: `torch.cuda.CUDAGraph` for NVIDIA and AMD, and in tests a recorder that fails
on what a real capture would not survive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """One captured step."""

    def replay(self) -> None:
        """Launch it again, on the same memory. Waits for nothing."""


class GraphBackend(Protocol):
    """Captures work that reads and writes memory at fixed places."""

    def capture(self, body: Callable[[], None]) -> Graph:
        """Run `body` once as it is, so that everything is compiled, then record it. It may allocate, from one pool that
        all graphs of this backend share; it may not wait for the device, nor read from it."""

    def held_bytes(self) -> int:
        """Memory that the graphs hold together, about."""


class CudaGraphs:
    """All graphs share one memory pool: only one replays at a time, and nothing is kept between two."""

    def __init__(self) -> None:
        """Nothing is held yet."""
        self._pool: Any = None
        self._held = 0

    def capture(self, body: Callable[[], None]) -> Graph:
        """See `GraphBackend`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            body()
        current.wait_stream(side)
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may ask their events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            body()
        self._held += max(0, torch.cuda.memory_reserved() - before)
        return graph

    def held_bytes(self) -> int:
        """See `GraphBackend`."""
        return self._held
