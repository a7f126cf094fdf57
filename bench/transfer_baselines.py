"""What `bench.transfer` measures the transports beside, in the same run: a memory copy, and a bare NIXL agent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kv_transfer import nixl_agent, segments
from kv_transfer.copying import checksums
from kv_transfer.nixl_endpoint import Endpoint
from kv_transfer.pool import PoolMemory

Timed = Callable[[int], float]
"""Moves so many blocks once; seconds."""


def memory_copy(pool: PoolMemory) -> Timed:
    """One thread copies whole blocks from one place of this process to another."""
    target = np.frombuffer(pool.buffer, dtype=np.uint8)
    source = np.full_like(target, 1)

    def copy(blocks: int) -> float:
        size = blocks * pool.block_bytes
        start = time.perf_counter()
        np.copyto(target[:size], source[:size])
        return time.perf_counter() - start

    return copy


class BareNixl:
    """An agent that READs the sending process's blocks: descriptors made before, one request, polled at once."""

    def __init__(self, endpoint: bytes, pool: PoolMemory, order: Sequence[int]) -> None:
        """`order`: the sender's blocks, as they are read."""
        api = nixl_agent.load()
        self._agent: Any = api.nixl_agent("bench-bare", api.nixl_agent_config(False, backends=["UCX"]))
        self._held = pool
        source, target = Endpoint.decode(endpoint), segments.of_pool(pool)
        self._agent.register_memory([(target.address, target.nbytes, 0, "")], "DRAM")
        self._peer = self._agent.add_remote_agent(source.metadata)
        size = pool.block_bytes
        self._source = self._cut(self._peer, source.blocks.address, pool.num_blocks, size)
        self._target = self._cut("NIXL_INIT_AGENT", target.address, pool.num_blocks, size)
        self._order = np.array(order, dtype=np.int32)

    def _cut(self, owner: Any, address: int, count: int, size: int) -> Any:
        rows = [(address + block * size, size, 0) for block in range(count)]
        return self._agent.prep_xfer_dlist(owner, np.array(rows, dtype=np.uint64), "DRAM")

    def __call__(self, blocks: int) -> float:
        """Seconds to read so many blocks."""
        numbers = np.arange(blocks, dtype=np.int32)
        start = time.perf_counter()
        transfer = self._agent.make_prepped_xfer("READ", self._target, numbers, self._source, self._order[:blocks])
        state = self._agent.transfer(transfer)
        while state == "PROC":
            state = self._agent.check_xfer_state(transfer)
        seconds = time.perf_counter() - start
        assert state == "DONE", state
        self._agent.release_xfer_handle(transfer)
        return seconds

    def checks(self, blocks: int) -> float:
        """Seconds for checksums of so many blocks that were read, as the transport takes them; in this thread."""
        start = time.perf_counter()
        checksums(self._held, range(blocks))
        return time.perf_counter() - start

    def close(self) -> None:
        """Forget the peer."""
        for prepared in (self._source, self._target):
            prepared.release()
        self._agent.remove_remote_agent(self._peer.decode())
        del self._agent
