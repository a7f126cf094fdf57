"""Transport over NIXL, the sender's end: its memory is registered, and receivers read it.

Life: made over a pool -> the first `endpoint()` starts the agent, registers blocks and generations, and says so in
bytes that stay the same -> a thread answers peers -> `close()`.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence

from kv_transfer import nixl_agent, segments
from kv_transfer.copying import checksums
from kv_transfer.messages import MAX_INCARNATION
from kv_transfer.nixl_agent import NixlAgent, start_agent
from kv_transfer.nixl_endpoint import MAX_BLOCKS, Endpoint
from kv_transfer.pool import PoolMemory
from tandem.errors import ConfigError, UnavailableError

_SHORTEST_PAUSE, _LONGEST_PAUSE, _PAUSE_SHARE = 2e-4, 2e-2, 0.02
"""Seconds between two looks for peers: a share of the time since somebody last opened a transfer or offered blocks."""


class NixlSource:
    """The sender's end."""

    name = "nixl"
    max_offer_bytes = 16 << 20
    """While the receiver reads one offer, checksums of the next are taken here."""

    def __init__(self, pool: PoolMemory, incarnation: str) -> None:
        """Starts nothing yet. Raises ConfigError where no NIXL wheel is installed."""
        nixl_agent.require_installed()
        if not 1 <= len(incarnation.encode()) <= MAX_INCARNATION:
            raise ConfigError(f"an incarnation has 1 to {MAX_INCARNATION} bytes")
        if pool.num_blocks > MAX_BLOCKS:
            raise ConfigError(
                f"transport nixl takes pools of at most {MAX_BLOCKS} blocks, not {pool.num_blocks}: use a larger "
                "--block-size, or --transport grpc"
            )
        self.pool = pool
        self.incarnation = incarnation
        self._lock = threading.Lock()
        self._agent: NixlAgent | None = None
        self._endpoint = b""
        self._thread: threading.Thread | None = None
        self._asked = threading.Event()
        self._last_asked = 0.0
        self._closed = False

    def endpoint(self) -> bytes:
        """See `nixl_endpoint`. Raises UnavailableError when the agent can't start, or after `close`."""
        with self._lock:
            if self._closed:
                raise UnavailableError("this worker is closing", reason="CLOSING")
            if self._agent is None:
                self._start()
        self._wake()
        return self._endpoint

    def _start(self) -> None:
        name = secrets.token_hex(16)
        agent = start_agent(name)
        blocks, generations = segments.of_pool(self.pool), segments.of_buffer(self.pool.generations)
        agent.register(blocks, self.pool.buffer)
        agent.register(generations, self.pool.generations)
        self._endpoint = Endpoint(
            self.incarnation, name, blocks, generations.address, self.pool.num_blocks, agent.metadata()
        ).encode()
        self._agent = agent
        self._thread = threading.Thread(target=self._answer, args=(agent,), name="kv-nixl-source", daemon=True)
        self._thread.start()

    def _answer(self, agent: NixlAgent) -> None:
        """The more often, the less time ago somebody opened a transfer or offered blocks."""
        while not self._closed:
            agent.progress()
            share = (time.monotonic() - self._last_asked) * _PAUSE_SHARE
            self._asked.wait(min(max(share, _SHORTEST_PAUSE), _LONGEST_PAUSE))
            self._asked.clear()

    def _wake(self) -> None:
        self._last_asked = time.monotonic()
        self._asked.set()

    def offer_payload(self, blocks: Sequence[int]) -> tuple[bytes, tuple[int, ...]]:
        """Only the blocks' CRC-32s ride in the stream."""
        self._wake()
        return b"", checksums(self.pool, blocks)

    def close(self) -> None:
        """Answer no more, end every connection. The pool is its owner's to close. Idempotent."""
        with self._lock:
            self._closed = True
            agent, self._agent = self._agent, None
        self._asked.set()
        if self._thread is not None:
            self._thread.join()
        if agent is not None:
            agent.close()
