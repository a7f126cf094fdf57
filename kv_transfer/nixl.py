"""Transport over NIXL, the receiver's end: it READs the sender's registered memory (by RDMA, TCP, or in one machine).

Life of a peer: first `connect` to an endpoint (`nixl_endpoint`) -> metadata loaded, descriptors cut once, shared by all
its transfers (`nixl_peer`) -> lost, when a read fails or hangs, or left, when others need its place. A lost peer is
known to nobody from then on, and stays in the agent until none of its reads is under way, which a thread looks after;
only then may its sender be met again (a restarted worker comes with another agent, and at once).

Copies run as in the other transports: generations (read from the sender's memory, too) around each copy and before the
commit, and a CRC-32 of each block, which the sender took when it offered it. Completion is told by the session's Acks,
not by NIXL's notifications: the sender frees nothing before the stream ends, and an Ack comes in order with the commit,
behind the check of generations, of which no notification knows.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from kv_transfer import nixl_agent, nixl_copy
from kv_transfer.copying import (
    check_blocks,
    check_checksums,
    check_target,
    corrupt_block,
)
from kv_transfer.messages import Offer
from kv_transfer.nixl_agent import NixlAgent, start_agent
from kv_transfer.nixl_endpoint import Endpoint
from kv_transfer.nixl_memory import TargetMemory
from kv_transfer.nixl_peer import Peer
from kv_transfer.pool import PoolMemory
from kv_transfer.transport import never
from tandem.errors import IncompatibleError, OverloadedError, StaleError, UnavailableError
from tandem.kv_layout import KvLayout

MOST_PEERS = 64
CHECK_THREADS = 2
SETTLE_PAUSE = 0.02
"""Seconds between two looks at the reads of peers that are lost."""


class NixlReader:
    """A SourceView that reads over the network."""

    def __init__(self, target: NixlTarget, peer: Peer) -> None:
        """Made by `NixlTarget.connect`."""
        self._target = target
        self._peer: Peer | None = peer

    def copy(
        self, offer: Offer, target_pool: PoolMemory, target_blocks: Sequence[int], stop: Callable[[], bool] = never
    ) -> None:
        """See `SourceView.copy`; UnsettledError when the sender is gone, or hangs for `nixl_peer.READ_SECONDS`."""
        peer, checking = self._require_peer(), self._target.checking
        check_checksums(offer)
        check_blocks(offer, peer.num_blocks)
        check_target(peer.block_bytes, target_pool, target_blocks)
        with self._target.reading(peer) as memory:
            nixl_copy.check_generations(peer, offer)
            with memory.blocks_of(target_pool) as into:
                corrupt = nixl_copy.read_blocks(peer, offer, into, target_pool, target_blocks, stop, checking)
            # First: of a block that was handed out again the bytes may differ, and nobody is to blame.
            nixl_copy.check_generations(peer, offer)
        if corrupt is not None:
            raise corrupt_block(offer, corrupt)

    def verify(self, offer: Offer) -> None:
        """See `SourceView.verify`."""
        peer = self._require_peer()
        with self._target.reading(peer):
            nixl_copy.check_generations(peer, offer)

    def close(self) -> None:
        """See `SourceView.close`."""
        peer, self._peer = self._peer, None
        if peer is not None:
            self._target.leave(peer)

    def _require_peer(self) -> Peer:
        peer = self._peer
        if peer is None:
            raise StaleError("the transfer is closed", reason="TRANSFER_OVER")
        return peer


class NixlTarget:
    """The receiver's end: one agent, one entry per source incarnation."""

    name = "nixl"
    side_by_side = False
    """Copies from one sender would only take the agent from each other, and all hang when it does."""

    def __init__(self) -> None:
        """Starts nothing yet. Raises ConfigError where no NIXL wheel is installed."""
        nixl_agent.require_installed()
        self._changed = threading.Condition()
        self._agent: NixlAgent | None = None
        self._memory: TargetMemory | None = None
        self._peers: dict[bytes, Peer] = {}
        self._lost: list[Peer] = []
        """Not in `_peers` any more, but in the agent."""
        self._settler: threading.Thread | None = None
        self.checking = ThreadPoolExecutor(CHECK_THREADS, thread_name_prefix="kv-nixl-check")
        """Takes checksums."""
        self._readers = 0
        self._closed = False

    @property
    def sources(self) -> int:
        """Peers known now."""
        return len(self._peers)

    def claims(self, endpoint: bytes) -> tuple[bytes, ...]:
        """See `Endpoint.claims`."""
        return Endpoint.decode(endpoint).claims()

    def connect(self, endpoint: bytes, source_incarnation: str, layout: KvLayout) -> NixlReader:
        """See `TargetTransport.connect`. Reads a generation, so that the way is open when the first offer comes."""
        wanted = Endpoint.decode(endpoint)
        if wanted.incarnation != source_incarnation:
            raise StaleError("another incarnation of the sender is there", reason="STALE_INCARNATION")
        if wanted.block_bytes != layout.block_bytes:
            raise IncompatibleError(f"the sender's pool has blocks of {wanted.block_bytes} bytes, not {layout}")
        wanted.claims()
        with self._changed:
            peer = self._enter(endpoint, wanted)
        try:
            with self.reading(peer):
                peer.generations.read([0])
        except BaseException:
            self.leave(peer)
            raise
        return NixlReader(self, peer)

    def _enter(self, key: bytes, endpoint: Endpoint) -> Peer:
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

    def _meet(self, agent: NixlAgent, endpoint: Endpoint) -> Peer:
        if any(peer.name == endpoint.agent for peer in self._lost):
            # Its last reads would end with the connection of the new ones.
            raise UnavailableError("the sender was lost; reads of it are still under way", reason="SOURCE_GONE")
        if any(peer.name == endpoint.agent for peer in self._peers.values()):
            raise IncompatibleError("another endpoint names this agent", reason="UNSAFE_MEMORY")
        name = agent.add_peer(endpoint.metadata)
        try:
            return Peer(name, endpoint, agent)
        except BaseException:
            agent.remove_peer(name)
            raise

    def _make_room(self, agent: NixlAgent) -> None:
        """Forget peers that nobody uses: those whose connection is lost, and the oldest when there are too many."""
        idle = [key for key, peer in self._peers.items() if not peer.views and not peer.readers]
        lost = [key for key in idle if not agent.knows(self._peers[key].name)]
        known = len(self._peers) + len(self._lost)
        oldest = [key for key in idle if key not in lost][: max(0, known - len(lost) + 1 - MOST_PEERS)]
        for key in (*lost, *oldest):
            self._peers.pop(key).forget()
        if len(self._peers) + len(self._lost) >= MOST_PEERS:
            raise OverloadedError(f"{MOST_PEERS} senders are read from already", reason="TOO_MANY_SOURCES")

    @contextlib.contextmanager
    def reading(self, peer: Peer) -> Iterator[TargetMemory]:
        """Around reads from a peer: it stays in the agent until they are over, and is lost if they fail."""
        with self._changed:
            if self._closed or peer.reads.lost or self._memory is None:
                raise UnavailableError("the connection to the sender is lost", reason="SOURCE_GONE")
            memory = self._memory
            peer.readers += 1
            self._readers += 1
        try:
            yield memory
        finally:
            with self._changed:
                peer.readers -= 1
                self._readers -= 1
                self._drop_lost(peer)
                self._changed.notify_all()
            self._settle()

    def _drop_lost(self, peer: Peer) -> None:
        """Out of the table at once, so that a new transfer begins anew."""
        if not peer.reads.lost:
            return
        for key in [key for key, known in self._peers.items() if known is peer]:
            del self._peers[key]
            self._lost.append(peer)

    def _settle(self) -> None:
        """Forget lost peers of which no read is under way any more, and give back what was lent to their reads."""
        if not self._lost:
            return
        with self._changed:
            over = [peer for peer in self._lost if not peer.readers and peer.reads.over()]
            for peer in over:
                self._lost.remove(peer)
                peer.forget()
            if self._lost and self._settler is None and not self._closed:
                self._settler = threading.Thread(target=self._settle_rest, name="kv-nixl-settler", daemon=True)
                self._settler.start()
        for peer in over:
            peer.reads.unsettled.settle()

    def _settle_rest(self) -> None:
        """A thread, while there are any: a sender that hung may answer at any time, and one that died fails at last."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, SETTLE_PAUSE)
                if self._closed or not self._lost:
                    self._settler = None
                    return
            self._settle()

    def leave(self, peer: Peer) -> None:
        """One view less."""
        with self._changed:
            peer.views -= 1

    def close(self) -> None:
        """Forget every source, once no thread reads any more. Reads that hang end with the agent. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._readers)
            self.checking.shutdown()
            agent, memory, self._agent, self._memory = self._agent, self._memory, None, None
            lost, self._lost = self._lost, []
            if agent is None or memory is None:
                return
            for peer in (*self._peers.values(), *lost):
                peer.forget()
            self._peers.clear()
            memory.close()
            agent.close()
            settler = self._settler
        for peer in lost:
            peer.reads.unsettled.settle()
        if settler is not None:
            settler.join()
