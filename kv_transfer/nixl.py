"""Transport over NIXL, the receiver's end: it READs the sender's registered memory (by RDMA, TCP, or in one machine).

Life of a peer: first `connect` to an endpoint (`nixl_endpoint`) -> metadata loaded, descriptors cut once, shared by all
its transfers -> forgotten when a read fails or the connection is lost (a restarted worker comes with a new endpoint),
or when others need its place.

Copies run as in the other transports: generations (read from the sender's memory, too) around each copy and before the
commit. Completion is told by the session's Acks, not by NIXL's notifications: the sender frees nothing before the
stream ends, and an Ack comes in order with the commit, behind the check of generations, of which no notification knows.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kv_transfer import nixl_agent
from kv_transfer.copying import check_blocks, check_payload_free, check_stop, check_target, stale_block
from kv_transfer.messages import Offer
from kv_transfer.nixl_agent import NixlAgent, start_agent
from kv_transfer.nixl_endpoint import Endpoint
from kv_transfer.nixl_memory import GenerationPages, TargetMemory
from kv_transfer.pool import PoolMemory
from kv_transfer.transport import never
from tandem.errors import IncompatibleError, OverloadedError, StaleError, UnavailableError
from tandem.kv_layout import KvLayout

MOST_PEERS = 64
PIECE_BYTES = 16 << 20
"""Most bytes a read: within one machine they are copied while it is posted, so `stop` waits for a few milliseconds."""
READS_AHEAD = 4
"""Pieces posted at once by one copy."""


class _Peer:
    """A source that the target knows. Its counters belong to the target's lock."""

    def __init__(self, name: str, endpoint: Endpoint, agent: NixlAgent) -> None:
        """Cut its memory into descriptors."""
        self.name = name
        self.num_blocks = endpoint.num_blocks
        self.block_bytes = endpoint.block_bytes
        self.blocks = agent.prepare(name, endpoint.blocks, endpoint.block_bytes)
        self.generations = GenerationPages(agent, name, endpoint.generations, endpoint.num_blocks)
        self.turn = threading.Lock()
        """Held by the copy that reads blocks: copies side by side would only take the agent from each other."""
        self.views = 0
        self.reads = 0
        self.lost = False


class NixlReader:
    """A SourceView that reads over the network."""

    def __init__(self, target: NixlTarget, peer: _Peer) -> None:
        """Made by `NixlTarget.connect`."""
        self._target = target
        self._peer: _Peer | None = peer

    def copy(
        self, offer: Offer, target_pool: PoolMemory, target_blocks: Sequence[int], stop: Callable[[], bool] = never
    ) -> None:
        """See `SourceView.copy`; UnavailableError, too, when the sender is gone. Never returns under a read."""
        peer = self._require_peer()
        check_payload_free(offer)
        check_blocks(offer, peer.num_blocks)
        check_target(peer.block_bytes, target_pool, target_blocks)
        with self._target.reading(peer) as (agent, memory):
            _check_generations(memory, peer, offer)
            with memory.blocks_of(target_pool) as into, peer.turn:
                _read_blocks(agent, peer, offer.blocks, into, target_blocks, stop)
            _check_generations(memory, peer, offer)

    def verify(self, offer: Offer) -> None:
        """See `SourceView.verify`."""
        peer = self._require_peer()
        with self._target.reading(peer) as (_, memory):
            _check_generations(memory, peer, offer)

    def close(self) -> None:
        """See `SourceView.close`."""
        peer, self._peer = self._peer, None
        if peer is not None:
            self._target.leave(peer)

    def _require_peer(self) -> _Peer:
        peer = self._peer
        if peer is None:
            raise StaleError("the transfer is closed", reason="TRANSFER_OVER")
        return peer


class NixlTarget:
    """The receiver's end: one agent, one entry per source incarnation."""

    name = "nixl"

    def __init__(self) -> None:
        """Starts nothing yet. Raises ConfigError where no NIXL wheel is installed."""
        nixl_agent.require_installed()
        self._changed = threading.Condition()
        self._agent: NixlAgent | None = None
        self._memory: TargetMemory | None = None
        self._peers: dict[bytes, _Peer] = {}
        self._reads = 0
        self._closed = False

    @property
    def sources(self) -> int:
        """Peers known now."""
        return len(self._peers)

    def connect(self, endpoint: bytes, source_incarnation: str, layout: KvLayout) -> NixlReader:
        """See `TargetTransport.connect`. Reads a generation, so that the way is open when the first offer comes."""
        wanted = Endpoint.decode(endpoint)
        if wanted.incarnation != source_incarnation:
            raise StaleError("another incarnation of the sender is there", reason="STALE_INCARNATION")
        if wanted.block_bytes != layout.block_bytes:
            raise IncompatibleError(f"the sender's pool has blocks of {wanted.block_bytes} bytes, not {layout}")
        with self._changed:
            peer = self._enter(endpoint, wanted)
        try:
            with self.reading(peer) as (_, memory):
                memory.read_generations(peer.generations, [0])
        except BaseException:
            self.leave(peer)
            raise
        return NixlReader(self, peer)

    def _enter(self, key: bytes, endpoint: Endpoint) -> _Peer:
        """The peer, new if need be, with one more view."""
        agent = self._start()
        peer = self._peers.pop(key, None)
        if peer is None:
            self._make_room(agent)
            peer = self._meet(agent, endpoint)
        self._peers[key] = peer  # the last one used is the last in the order
        peer.views += 1
        return peer

    def _start(self) -> NixlAgent:
        if self._closed:
            raise UnavailableError("this worker is closing", reason="CLOSING")
        if self._agent is None:
            self._agent = start_agent(secrets.token_hex(16))
            self._memory = TargetMemory(self._agent)
        return self._agent

    def _meet(self, agent: NixlAgent, endpoint: Endpoint) -> _Peer:
        name = agent.add_peer(endpoint.metadata)
        if name != endpoint.agent:
            # Its own name, then, or another's: not ours to remove, nobody reads from it by this endpoint.
            raise IncompatibleError("the sender's agent isn't the one that its endpoint names", reason="UNSAFE_MEMORY")
        try:
            return _Peer(name, endpoint, agent)
        except BaseException:
            agent.remove_peer(name)
            raise

    def _make_room(self, agent: NixlAgent) -> None:
        """Forget peers that nobody uses: those whose connection is lost, and the oldest when there are too many."""
        idle = [key for key, peer in self._peers.items() if not peer.views and not peer.reads]
        lost = [key for key in idle if not agent.knows(self._peers[key].name)]
        oldest = [key for key in idle if key not in lost][: max(0, len(self._peers) - len(lost) + 1 - MOST_PEERS)]
        for key in (*lost, *oldest):
            self._forget(agent, self._peers.pop(key))
        if len(self._peers) >= MOST_PEERS:
            raise OverloadedError(f"{MOST_PEERS} senders are read from already", reason="TOO_MANY_SOURCES")

    def _forget(self, agent: NixlAgent, peer: _Peer) -> None:
        for prepared in (peer.blocks, peer.generations.prepared):
            agent.release(prepared)
        agent.remove_peer(peer.name)

    @contextlib.contextmanager
    def reading(self, peer: _Peer) -> Iterator[tuple[NixlAgent, TargetMemory]]:
        """Around reads from a peer: it stays known until they are over, and is forgotten if they fail."""
        with self._changed:
            if self._closed or peer.lost or self._agent is None or self._memory is None:
                raise UnavailableError("the connection to the sender is lost", reason="SOURCE_GONE")
            agent, memory = self._agent, self._memory
            peer.reads += 1
            self._reads += 1
        try:
            yield agent, memory
        except UnavailableError:
            peer.lost = True
            raise
        finally:
            with self._changed:
                peer.reads -= 1
                self._reads -= 1
                self._drop_lost(agent, peer)
                self._changed.notify_all()

    def _drop_lost(self, agent: NixlAgent, peer: _Peer) -> None:
        """Out of the table at once, so that a new transfer begins anew; forgotten after the last read."""
        if not peer.lost:
            return
        for key in [key for key, known in self._peers.items() if known is peer]:
            del self._peers[key]
        if not peer.reads:
            self._forget(agent, peer)

    def leave(self, peer: _Peer) -> None:
        """One view less."""
        with self._changed:
            peer.views -= 1

    def close(self) -> None:
        """Forget every source, once the reads under way are over. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._reads)
            agent, memory, self._agent, self._memory = self._agent, self._memory, None, None
            if agent is None or memory is None:
                return
            for peer in self._peers.values():
                self._forget(agent, peer)
            self._peers.clear()
            memory.close()
            agent.close()


def _check_generations(memory: TargetMemory, peer: _Peer, offer: Offer) -> None:
    held = memory.read_generations(peer.generations, offer.blocks)
    for block, now, then in zip(offer.blocks, held, offer.generations, strict=True):
        if now != then:
            raise stale_block(block)


def _read_blocks(
    agent: NixlAgent,
    peer: _Peer,
    blocks: Sequence[int],
    into: Any,
    into_blocks: Sequence[int],
    stop: Callable[[], bool],
) -> None:
    """A few pieces ahead of the one that is waited for; whatever happens, all that was posted is waited for."""
    step = max(1, PIECE_BYTES // peer.block_bytes)
    posted: deque[Any] = deque()
    try:
        for at in range(0, len(blocks), step):
            check_stop(stop)
            posted.append(agent.read(into, into_blocks[at : at + step], peer.blocks, blocks[at : at + step]))
            if len(posted) == READS_AHEAD:
                agent.wait(posted.popleft())
        while posted:
            agent.wait(posted.popleft())
    finally:
        for rest in posted:
            with contextlib.suppress(UnavailableError):
                agent.wait(rest)
