"""NIXL when a sender hangs or a read fails: copies end in time, and memory that may still be written stays lent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fake_nixl
import pytest

from kv_transfer import nixl_agent, nixl_copy, nixl_memory, nixl_peer, staging
from kv_transfer.copying import checksums
from kv_transfer.messages import Offer
from kv_transfer.nixl import NixlTarget
from kv_transfer.nixl_endpoint import Endpoint
from kv_transfer.nixl_source import NixlSource
from kv_transfer.pool import LocalPool
from kv_transfer.session import ReceiveSession
from kv_transfer.staging import StagingPool
from kv_transfer.unsettled import Unsettled, UnsettledError, lent
from tandem.errors import (
    DataCorruptionError,
    IncompatibleError,
    InvalidRequestError,
    PermissionDeniedError,
    UnavailableError,
)
from tandem.kv_layout import KvLayout

LAYOUT = KvLayout(block_size=4, dtype="float32", num_layers=2, num_kv_heads=3, head_dim=8)
SECONDS = 20.0


class Trouble:
    """Two ends over the fake, and what can be done to the sender."""

    def __init__(self, tools: Any) -> None:
        self.tools = tools
        self.ends = tools.make_ends("nixl")
        self.agent = Endpoint.decode(self.ends.source.endpoint()).agent
        self.released = threading.Event()

    @property
    def target(self) -> NixlTarget:
        target: NixlTarget = self.ends.target
        return target

    def hang(self) -> None:
        fake_nixl.nixl_agent.hung.add(self.agent)

    def wake(self) -> None:
        fake_nixl.nixl_agent.hung.clear()

    def offer(self, *blocks: int) -> Offer:
        pool = self.ends.source_pool
        held = tuple(pool.generations[block] for block in blocks)
        return Offer(0, 0, 4 * len(blocks), blocks, held, checksums=checksums(pool, blocks))

    def lease(self) -> Any:
        return self.ends.leases.grant("r", 0, 8, [4, 5], self.released.set)

    def connect(self) -> Any:
        return self.target.connect(self.ends.source.endpoint(), "source-1", LAYOUT)


@pytest.fixture
def trouble(tools: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    tools.use_fake_nixl(monkeypatch)
    monkeypatch.setattr(nixl_peer, "READ_SECONDS", 0.05)
    monkeypatch.setattr(fake_nixl.nixl_agent, "hung", set())
    made = Trouble(tools)
    yield made
    tools.close_ends(made.ends)


# A sender that hangs.


def test_blocks_stay_lent_while_a_hung_sender_may_answer(trouble: Trouble) -> None:
    """The copy ends in time; what wakes up later writes into blocks that nobody else has."""
    sent = [trouble.tools.fill(trouble.ends.source_pool, block, block) for block in (0, 1)]
    lease = trouble.lease()
    send, receive = trouble.ends.opened(lease)
    send.ready(8, [0, 1])
    plan = receive.on_offer(send.next_offer())
    trouble.hang()
    with pytest.raises(UnavailableError) as caught:
        receive.copy(plan)
    assert caught.value.reason == "SOURCE_SILENT"
    receive.close()
    lease.close()
    assert not lease.released
    trouble.wake()
    assert trouble.released.wait(SECONDS)
    assert lease.released
    assert len(sent) == 2


def test_bytes_of_a_sender_that_wakes_up_come_before_the_blocks_are_free(trouble: Trouble) -> None:
    sent = [trouble.tools.fill(trouble.ends.source_pool, block, block) for block in (0, 1)]
    seen: list[list[bytes]] = []
    pool = trouble.ends.target_pool
    freed = threading.Event()

    def free() -> None:
        seen.append([trouble.tools.read(pool, block) for block in (4, 5)])
        freed.set()

    view, offer = trouble.connect(), trouble.offer(0, 1)
    plain = nixl_copy.check_generations

    def then_hang(*args: Any) -> None:
        plain(*args)
        trouble.hang()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nixl_copy, "check_generations", then_hang)
        with pytest.raises(UnsettledError), lent(free):
            view.copy(offer, pool, [4, 5])
    assert seen == []
    assert not freed.is_set()
    trouble.wake()
    assert freed.wait(SECONDS)
    assert seen == [sent]


def test_a_hung_sender_is_met_anew_only_when_its_last_reads_are_over(trouble: Trouble) -> None:
    view = trouble.connect()
    trouble.hang()
    over = threading.Event()
    with pytest.raises(UnsettledError), lent(over.set):
        view.copy(trouble.offer(0), trouble.ends.target_pool, [1])
    assert trouble.target.sources == 0
    with pytest.raises(UnavailableError, match="still under way"):
        trouble.connect()
    with pytest.raises(UnavailableError, match="connection to the sender is lost"):
        view.copy(trouble.offer(0), trouble.ends.target_pool, [1])
    trouble.wake()
    assert over.wait(SECONDS)
    again = trouble.connect()
    again.copy(trouble.offer(0), trouble.ends.target_pool, [1])
    view.close()
    again.copy(trouble.offer(0), trouble.ends.target_pool, [1])


def test_opens_of_a_hung_sender_end(trouble: Trouble) -> None:
    trouble.hang()
    with pytest.raises(UnavailableError) as caught:
        trouble.connect()
    assert caught.value.reason == "SOURCE_SILENT"


def test_the_others_copy_while_one_hangs(trouble: Trouble) -> None:
    """Its generations have memory of their own, of which it can have all."""
    view = trouble.connect()
    healthy = NixlSource(trouble.ends.source_pool, "source-2")
    other = trouble.target.connect(healthy.endpoint(), "source-2", LAYOUT)
    trouble.hang()
    threads = [threading.Thread(target=lambda: _fails(view, trouble)) for _ in range(2 * nixl_peer._SLOTS)]
    for thread in threads:
        thread.start()
    other.copy(trouble.offer(0), trouble.ends.target_pool, [1])
    for thread in threads:
        thread.join()
    other.copy(trouble.offer(0), trouble.ends.target_pool, [1])
    healthy.close()


def _fails(view: Any, trouble: Trouble) -> None:
    with pytest.raises(UnavailableError):
        view.verify(trouble.offer(0))


def test_closing_with_a_hung_sender_gives_everything_back(trouble: Trouble) -> None:
    view = trouble.connect()
    trouble.hang()
    over = threading.Event()
    with pytest.raises(UnsettledError), lent(over.set):
        view.copy(trouble.offer(0), trouble.ends.target_pool, [1])
    assert not over.is_set()
    trouble.target.close()
    assert over.is_set()
    assert "kv-nixl-settler" not in {thread.name for thread in threading.enumerate()}


# A read that fails.


def test_one_failed_read_keeps_the_memory_of_the_others(trouble: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second piece fails; the third is still under way, and comes before anybody has the block."""
    monkeypatch.setattr(nixl_copy, "PIECE_BYTES", 1)
    monkeypatch.setattr(fake_nixl.nixl_agent, "polls", 3)
    view, pool = trouble.connect(), trouble.ends.target_pool
    sent = [trouble.tools.fill(trouble.ends.source_pool, block, block) for block in range(3)]
    offer, over = trouble.offer(0, 1, 2), threading.Event()
    plain = nixl_agent.NixlAgent.wait
    waits = iter(["the generations", "first piece", "second piece"])

    def wait(self: Any, posted: Any, seconds: float) -> None:
        if next(waits) == "second piece":
            posted.state = "ERR"
            trouble.hang()
        plain(self, posted, seconds)

    monkeypatch.setattr(nixl_agent.NixlAgent, "wait", wait)
    with pytest.raises(UnsettledError) as caught, lent(over.set):
        view.copy(offer, pool, [4, 5, 6])
    assert caught.value.reason == "SOURCE_GONE"
    assert not over.is_set()
    assert trouble.tools.read(pool, 6) != sent[2]
    trouble.wake()
    assert over.wait(SECONDS)
    assert trouble.tools.read(pool, 6) == sent[2]


def test_descriptors_and_slots_stay_held_as_well(trouble: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle pools make room, this one can't; a slot of the staging memory isn't given to anybody else."""
    monkeypatch.setattr(nixl_memory, "MOST_POOLS", 1)
    monkeypatch.setattr(staging, "SLOT_WAIT_SECONDS", 0.01)
    slots = StagingPool(1)
    view, offer, reads = trouble.connect(), trouble.offer(0), Unsettled()
    with (
        pytest.raises(UnsettledError),
        slots.slot(1, LAYOUT.block_bytes) as slot,
        trouble.target.reading(view._peer) as memory,
        memory.blocks_of(slot),
    ):
        raise UnsettledError("a read hangs", reason="SOURCE_SILENT", reads=reads)
    assert not slots.idle
    with pytest.raises(UnavailableError, match="no room to convert"), slots.slot(1, 8):
        pass
    view.copy(offer, trouble.ends.target_pool, [1])
    assert len(memory._pools) == 2
    reads.settle()
    assert slots.idle
    view.copy(offer, LocalPool(2, LAYOUT.block_bytes), [1])
    assert len(memory._pools) == 1


def test_what_is_lent_comes_back_once_whatever_happens() -> None:
    back: list[str] = []
    with lent(lambda: back.append("well")):
        assert back == []
    with pytest.raises(ZeroDivisionError), lent(lambda: back.append("error")):
        raise ZeroDivisionError
    reads = Unsettled()
    with pytest.raises(UnsettledError), lent(lambda: back.append("outer")), lent(lambda: back.append("inner")):
        raise UnsettledError("x", reason="X", reads=reads)
    assert back == ["well", "error"]
    reads.settle()
    reads.settle()
    assert back == ["well", "error", "inner", "outer"]
    with pytest.raises(UnsettledError), lent(lambda: back.append("at once")):
        raise UnsettledError("x", reason="X", reads=reads)
    assert back[-1] == "at once"


# Bytes that aren't what was offered.


def test_a_byte_that_changes_on_the_way_is_found_and_another_attempt_brings_it(trouble: Trouble) -> None:
    pool = trouble.ends.source_pool
    sent = trouble.tools.fill(pool, 3, 9)
    lease = trouble.ends.grant(0, 4, first_block=6)
    send, receive = trouble.ends.opened(lease)
    send.ready(4, [3])
    offer = send.next_offer()
    pool.buffer[3 * pool.block_bytes + 17] ^= 0x40
    with pytest.raises(DataCorruptionError) as caught:
        receive.copy(receive.on_offer(offer))
    assert caught.value.reason == "CHECKSUM"
    receive.close()
    pool.buffer[3 * pool.block_bytes + 17] ^= 0x40
    assert not lease.retarget(1)
    send, receive = trouble.ends.opened(lease, attempt=1)
    send.ready(4, [3])
    assert trouble.ends.pump(send, receive) == 1
    assert trouble.ends.commit(send, receive)
    assert trouble.tools.read(trouble.ends.target_pool, 6) == sent


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_corrupt_block_is_named(trouble: Trouble, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(nixl_copy, "PIECE_BYTES", 2 * LAYOUT.block_bytes)
    view, offer = trouble.connect(), trouble.offer(*range(7))
    trouble.ends.source_pool.buffer[place * LAYOUT.block_bytes] ^= 1
    with pytest.raises(DataCorruptionError, match=f"block {place} of offer 0"):
        view.copy(offer, trouble.ends.target_pool, list(range(7, 14)))


def test_offers_without_checksums_are_refused(trouble: Trouble) -> None:
    view, offer = trouble.connect(), trouble.offer(0, 1)
    for changes in ({"checksums": ()}, {"checksums": offer.checksums[:1]}, {"payload": b"x"}):
        with pytest.raises(InvalidRequestError) as caught:
            view.copy(replace(offer, **changes), trouble.ends.target_pool, [1, 2])
        assert caught.value.field == "offer.checksums"


# An agent and its addresses are one sender's.


def test_no_other_incarnation_may_name_the_agent_or_its_address(trouble: Trouble) -> None:
    lease = trouble.lease()
    send, _ = trouble.ends.opened(lease)
    own = Endpoint.decode(send.open().endpoint)
    # Of the same bytes but for the incarnation; and of another name at the same address.
    renamed = fake_nixl.metadata("another", [], address=b"@" + own.agent.encode())
    for endpoint in (
        replace(own, incarnation="thief"),
        replace(own, incarnation="thief", agent="another", metadata=renamed),
    ):
        lease.retarget(lease.attempt + 1)
        theft = replace(
            send.open(), source_incarnation="thief", endpoint=endpoint.encode(), secret=b"t" * 32, attempt=lease.attempt
        )
        with pytest.raises(PermissionDeniedError, match="presents the nixl endpoint of incarnation 'source-1'"):
            ReceiveSession(trouble.ends.receiver).on_open(theft)


def test_two_endpoints_of_one_agent_are_not_both_met(trouble: Trouble) -> None:
    trouble.connect()
    own = Endpoint.decode(trouble.ends.source.endpoint())
    with pytest.raises(IncompatibleError) as caught:
        trouble.target.connect(replace(own, generations=own.generations + 8).encode(), "source-1", LAYOUT)
    assert caught.value.reason == "UNSAFE_MEMORY"


# Memory is registered as a whole.


def test_views_of_one_memory_are_registered_once(trouble: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    plain = fake_nixl.nixl_agent.register_memory
    monkeypatch.setattr(
        fake_nixl.nixl_agent, "register_memory", lambda self, *args: (calls.append(args), plain(self, *args))[1]
    )
    view, slots = trouble.connect(), StagingPool(2)
    calls.clear()
    for blocks in (1, 2, 3, 2, 1):
        with slots.slot(blocks, LAYOUT.block_bytes) as one, slots.slot(blocks, LAYOUT.block_bytes) as two:
            view.copy(trouble.offer(0), one, [0])
            view.copy(trouble.offer(1), two, [0])
    assert len(calls) == 1


def test_memory_of_which_no_view_is_left_is_deregistered(trouble: Trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_memory, "MOST_POOLS", 2)
    view, slots = trouble.connect(), StagingPool(1)
    with slots.slot(1, LAYOUT.block_bytes) as slot:
        view.copy(trouble.offer(0), slot, [0])
    memory = trouble.target._memory
    assert memory is not None
    pools = [LocalPool(2, LAYOUT.block_bytes) for _ in range(3)]
    for pool in pools:
        view.copy(trouble.offer(0), pool, [0])
    assert len(memory._wholes) == 2
