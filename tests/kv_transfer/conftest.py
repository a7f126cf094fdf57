"""Two workers' pools, a transport between them, and everything a transfer needs, for each transport."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from kv_transfer import nixl_agent
from kv_transfer.leases import Lease, LeaseTable
from kv_transfer.messages import Commit, Committed, Opened
from kv_transfer.pool import LocalPool, PoolMemory, SharedPool
from kv_transfer.registry import source_transport, target_transport
from kv_transfer.session import Receiver, ReceiveSession, Sender, SendSession
from kv_transfer.transport import SourceTransport, TargetTransport
from tandem.kv_layout import KvLayout
from tandem.record import OutputState, Record, SamplingParams, StopRules

LAYOUT = KvLayout(block_size=4, dtype="float32", num_layers=2, num_kv_heads=3, head_dim=8)
NUM_BLOCKS = 32

# Helper modules are imported under their own names (importlib mode leaves sys.path alone).
_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

import fake_nixl  # noqa: E402

NIXL = ["nixl-fake", *(["nixl-real"] if nixl_agent.installed() else [])]
"""The real agent wherever its wheel is installed; a test of test_nixl.py says in its name which it is."""
MAPPED = ["memory", "shm"]
ALL = [*MAPPED, "grpc", *NIXL]


def fill(pool: PoolMemory, block: int, value: int) -> bytes:
    """Write one block; returns its bytes."""
    data = bytes((value + i) % 251 for i in range(pool.block_bytes))
    pool.buffer[block * pool.block_bytes : (block + 1) * pool.block_bytes] = data
    return data


def read(pool: PoolMemory, block: int) -> bytes:
    """One block's bytes."""
    return bytes(pool.buffer[block * pool.block_bytes : (block + 1) * pool.block_bytes])


def reuse(pool: PoolMemory, block: int) -> None:
    """What the owner's block pool and engine do when a block goes to somebody else."""
    pool.generations[block] += 1
    fill(pool, block, 199)


def record(request_id: str = "r") -> Record:
    """A record with its first token."""
    return Record(request_id, "model", [1, 2], SamplingParams(), StopRules(8), [OutputState([7])])


@dataclass
class Ends:
    """A sending and a receiving worker in one process."""

    source_pool: PoolMemory
    source: SourceTransport
    target: TargetTransport
    target_pool: PoolMemory
    sender: Sender
    receiver: Receiver
    released: list[str] = field(default_factory=list)

    @property
    def leases(self) -> LeaseTable:
        return self.receiver.leases

    def grant(self, start: int, end: int, first_block: int = 0, request_id: str = "r") -> Lease:
        """Lease the receiver's blocks from `first_block` on."""
        size = LAYOUT.block_size
        count = -(-end // size) - start // size
        blocks = range(first_block, first_block + count)
        return self.leases.grant(request_id, start, end, blocks, lambda: self.released.append(request_id))

    def pair(self, lease: Lease, attempt: int = 0, window: int = 8) -> tuple[SendSession, ReceiveSession]:
        """Both sides of one transfer, not open yet."""
        send = SendSession(
            self.sender,
            self.source,
            lease_id=lease.lease_id,
            attempt=attempt,
            target_incarnation=self.leases.incarnation,
            window=window,
        )
        return send, ReceiveSession(self.receiver, window)

    def opened(self, lease: Lease, attempt: int = 0, window: int = 8) -> tuple[SendSession, ReceiveSession]:
        """Both sides of one transfer after Open and Opened."""
        send, receive = self.pair(lease, attempt, window)
        opened = receive.on_open(send.open())
        assert opened == Opened(lease.needed_start, lease.needed_end, self.receiver.layout.block_size)
        send.on_opened(opened)
        return send, receive

    def pump(self, send: SendSession, receive: ReceiveSession) -> int:
        """Offer, copy and acknowledge until nothing is ready; how many offers that took."""
        count = 0
        while (offer := send.next_offer()) is not None:
            send.on_ack(receive.copy(receive.on_offer(offer)))
            count += 1
        return count

    def commit(self, send: SendSession, receive: ReceiveSession, request_id: str = "r") -> bool:
        """Commit; True if this attempt did it."""
        message: Commit = send.commit(record(request_id))
        answer: Committed = receive.on_commit(message)
        return send.on_committed(answer)


def make_ends(variant: str, **changes: int) -> Ends:
    name = variant.split("-")[0]
    layout = replace(LAYOUT, **changes)
    pool_type: Callable[[int, int], PoolMemory] = SharedPool if name == "shm" else LocalPool
    source_pool = pool_type(NUM_BLOCKS, layout.block_bytes)
    target_pool = LocalPool(NUM_BLOCKS, layout.block_bytes)
    target = target_transport(name)
    receiver = Receiver(
        LeaseTable("target-1", layout.block_size), target_pool, layout, "model", "exact", {name: target}
    )
    return Ends(
        source_pool,
        source_transport(name, source_pool, "source-1"),
        target,
        target_pool,
        Sender("source-1", "model", "exact", layout),
        receiver,
    )


def close_ends(ends: Ends) -> None:
    ends.source.close()
    ends.target.close()
    if isinstance(ends.source_pool, SharedPool):
        ends.source_pool.close()


def use_fake_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "installed", lambda: True)
    monkeypatch.setattr(nixl_agent, "load", lambda: fake_nixl)


def _made(variant: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    if variant == "nixl-fake":
        use_fake_nixl(monkeypatch)
    made = make_ends(variant)
    yield made
    close_ends(made)


@pytest.fixture(params=ALL)
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """Two workers, once per transport."""
    yield from _made(request.param, monkeypatch)


@pytest.fixture(params=[*MAPPED, *NIXL])
def seen_ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """Two workers, once per transport whose reader reaches into the sender's memory."""
    yield from _made(request.param, monkeypatch)


@pytest.fixture(params=MAPPED)
def mapped_ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """Two workers, once per transport whose reader copies from the sender's memory itself."""
    yield from _made(request.param, monkeypatch)


@pytest.fixture(params=NIXL)
def nixl_ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """Two workers over NIXL."""
    yield from _made(request.param, monkeypatch)


@pytest.fixture(params=[*MAPPED, "grpc", "nixl-fake"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each transport in turn, for tests that make their own ends."""
    return _name_of(request.param, monkeypatch)


@pytest.fixture(params=ALL)
def any_transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `transport`, with the real NIXL wherever it is installed: it takes longer to start."""
    return _name_of(request.param, monkeypatch)


def _name_of(variant: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if variant == "nixl-fake":
        use_fake_nixl(monkeypatch)
    return variant.split("-")[0]


@pytest.fixture
def local_ends() -> Iterator[Ends]:
    """Two workers over the in-memory transport, where the transport doesn't matter."""
    made = make_ends("memory")
    yield made
    close_ends(made)


class Tools:
    """What test modules share (there is no package to import from)."""

    LAYOUT = LAYOUT
    NIXL = NIXL
    NUM_BLOCKS = NUM_BLOCKS
    fill = staticmethod(fill)
    read = staticmethod(read)
    reuse = staticmethod(reuse)
    record = staticmethod(record)
    make_ends = staticmethod(make_ends)
    close_ends = staticmethod(close_ends)
    use_fake_nixl = staticmethod(use_fake_nixl)

    @staticmethod
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    """Helpers."""
    return Tools
