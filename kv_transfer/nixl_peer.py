"""One source as a NIXL target knows it: its memory as descriptors, and every read of it.

Life: made when first met -> reads -> the first that fails, or isn't over in time, is the last: the peer is lost, and
that copy's memory stays lent (`unsettled`) -> no read of it is under way any more (`over`): `forget`, `settle`.

A read is never given up: nothing keeps a network card, or a sender that wakes up, from answering it later. What one
failed read says of the others, which may have been posted with it, nobody knows: they count as under way until the
agent has forgotten the peer, and with it the connection.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kv_transfer import segments
from kv_transfer.nixl_agent import LOCAL, NixlAgent, Posted
from kv_transfer.nixl_endpoint import Endpoint
from kv_transfer.segments import Segment
from kv_transfer.unsettled import Unsettled, UnsettledError, lent
from tandem.errors import UnavailableError

READ_SECONDS = 5.0
"""How long one read may take: with the largest, that is 3 MB/s."""
GENERATION_BYTES = 8
PAGE = 64
"""Generations that are read together: one small read costs as much as one of 512 bytes."""
_SLOTS, _SLOT_PAGES = 8, 64


class PeerReads:
    """Reads of one peer, and whether it is lost. Thread-safe."""

    def __init__(self, agent: NixlAgent, name: str) -> None:
        """`name` of the peer's agent."""
        self._agent = agent
        self.name = name
        self.unsettled = Unsettled()
        self.lost = False
        self._left: list[Posted] = []
        """Failed, or not over in time; whoever asked for them doesn't wait any more."""

    def post(self, into: Any, into_pieces: Sequence[int], source: Any, source_pieces: Sequence[int]) -> Posted:
        """See `NixlAgent.read`. Raises UnsettledError."""
        try:
            return self._agent.read(into, into_pieces, source, source_pieces)
        except UnavailableError as error:
            raise self.lose(error) from error

    def wait(self, posted: Posted) -> None:
        """Until it is over. Raises UnsettledError when it failed, or took longer than READ_SECONDS."""
        try:
            self._agent.wait(posted, READ_SECONDS)
        except UnavailableError as error:
            self._left.append(posted)
            raise self.lose(error) from error

    def finish(self, posted: deque[Posted]) -> None:
        """Wait for all of them. Raises UnsettledError: those of a peer that is lost are left."""
        while posted:
            if self.lost:
                self._left.extend(posted)
                posted.clear()
                raise self.lose(UnavailableError("the connection to the sender is lost", reason="SOURCE_GONE"))
            self.wait(posted.popleft())

    def lose(self, error: UnavailableError) -> UnsettledError:
        """From now on nobody reads from this peer; the error for who did."""
        self.lost = True
        return UnsettledError(error.message, reason=error.reason, reads=self.unsettled)

    def over(self) -> bool:
        """True when none of the reads that were left is under way. Only while nobody else reads."""
        return all(self._agent.over(posted) for posted in self._left)

    def forget(self, prepared: Iterable[Any]) -> None:
        """Take the peer, with `prepared` descriptors of it, out of the agent: the connection ends."""
        for posted in self._left:
            self._agent.release(posted.transfer)
        self._left.clear()
        for each in prepared:
            self._agent.release(each)
        self._agent.remove_peer(self.name)


class Generations:
    """A peer's generations, read page by page into memory of their own. Thread-safe."""

    def __init__(self, agent: NixlAgent, reads: PeerReads, address: int, num_blocks: int) -> None:
        """`address` of the first generation in the peer's memory."""
        self._agent, self._reads, self._num_blocks = agent, reads, num_blocks
        self._size = min(PAGE, num_blocks)
        last = num_blocks - self._size
        starts = [GENERATION_BYTES * start for start in (*range(0, last, self._size), last)]
        page = GENERATION_BYTES * self._size
        segment = Segment(address, GENERATION_BYTES * num_blocks)
        self.prepared = agent.prepare_pieces(reads.name, segment, starts, page)
        self._scratch = np.zeros((_SLOTS, _SLOT_PAGES * self._size), dtype=np.uint64)
        whole = segments.of_buffer(self._scratch.data.cast("B"))
        self._registered = agent.register(whole, self._scratch)
        self._pages = agent.prepare(LOCAL, whole, page)
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(_SLOTS):
            self._slots.put(slot)

    def read(self, blocks: Sequence[int]) -> list[int]:
        """Of `blocks`, now. Raises UnsettledError."""
        places = [self._place(block) for block in blocks]
        wanted = sorted({page for page, _ in places})
        held: dict[int, list[int]] = {}
        try:
            slot = self._slots.get(timeout=READ_SECONDS)
        except queue.Empty:
            raise self._reads.lose(
                UnavailableError("no read of the sender's memory ends any more", reason="SOURCE_SILENT")
            ) from None
        with lent(lambda: self._slots.put(slot)):
            for at in range(0, len(wanted), _SLOT_PAGES):
                held |= self._read_pages(wanted[at : at + _SLOT_PAGES], slot)
        return [held[page][at] for page, at in places]

    def _place(self, block: int) -> tuple[int, int]:
        """Page of a block's generation, and where in the page it is. The last page may overlap the one before it."""
        page, last = block // self._size, self._num_blocks - self._size
        return page, block - min(page * self._size, last)

    def _read_pages(self, wanted: Sequence[int], slot: int) -> dict[int, list[int]]:
        """At most `_SLOT_PAGES` pages, by number."""
        first = slot * _SLOT_PAGES
        into = range(first, first + len(wanted))
        self._reads.wait(self._reads.post(self._pages, into, self.prepared, wanted))
        held = self._scratch[slot, : len(wanted) * self._size].reshape(-1, self._size).tolist()
        return dict(zip(wanted, held, strict=True))

    def close(self) -> None:
        """Give this side's memory back; no read of the peer may be under way."""
        self._agent.release(self._pages)
        self._agent.deregister(self._registered, self._scratch)


class Peer:
    """A source that the target knows. Its counters belong to the target's lock."""

    def __init__(self, name: str, endpoint: Endpoint, agent: NixlAgent) -> None:
        """Cut its memory into descriptors."""
        self.name = name
        self.num_blocks = endpoint.num_blocks
        self.block_bytes = endpoint.block_bytes
        self.reads = PeerReads(agent, name)
        self.blocks = agent.prepare(name, endpoint.blocks, endpoint.block_bytes)
        self.generations = Generations(agent, self.reads, endpoint.generations, endpoint.num_blocks)
        self.views = 0
        self.readers = 0
        """Threads that read from it now."""

    def forget(self) -> None:
        """Out of the agent. What was lent to reads is the caller's to settle."""
        self.reads.forget((self.blocks, self.generations.prepared))
        self.generations.close()
