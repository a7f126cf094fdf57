from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from kv_transfer.messages import Ack, Commit, Committed, Offer, Opened
from kv_transfer.pool import LocalPool
from kv_transfer.session import Receiver, ReceiveSession, SendSession
from tandem.errors import (
    IncompatibleError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    StaleError,
    TandemError,
    UnavailableError,
)
from tandem.record import OutputState, Record, SamplingParams, StopRules


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 4), (0, 10), (4, 12), (8, 31), (120, 128)])
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 64])
def test_whole_transfer(ends: Any, tools: Any, start: int, end: int, chunk: int) -> None:
    """Only the needed blocks travel, the last perhaps in part, whatever the chunks."""
    blocks = list(range(tools.NUM_BLOCKS))[::-1]
    sent = [tools.fill(ends.source_pool, block, 7 * i) for i, block in enumerate(blocks)]
    lease = ends.grant(start, end)
    send, receive = ends.opened(lease)
    for computed in [*range(chunk, end, chunk), end]:
        send.ready(computed, blocks)
        ends.pump(send, receive)
    assert send.all_offered
    assert send.bytes_offered == len(lease.blocks) * ends.source_pool.block_bytes
    assert ends.commit(send, receive)
    assert lease.committed
    assert [tools.read(ends.target_pool, block) for block in lease.blocks] == sent[start // 4 : -(-end // 4)]
    receive.close()
    assert ends.released == []
    lease.close()
    assert ends.released == ["r"]


def test_an_empty_range_commits_without_offers(ends: Any) -> None:
    lease = ends.grant(8, 8)
    send, receive = ends.opened(lease)
    assert send.next_offer() is None
    assert ends.commit(send, receive)


# The sender's side.


def test_prefill_need_not_wait_for_opened(local_ends: Any) -> None:
    send, _ = local_ends.pair(local_ends.grant(4, 10))
    send.ready(8, [0, 1])
    assert send.next_offer() is None
    assert not send.all_offered
    send.on_opened(Opened(4, 10, 4))
    offer = send.next_offer()
    assert (offer.sequence, offer.token_start, offer.token_end, offer.blocks) == (0, 4, 8, (1,))
    assert send.next_offer() is None
    send.ready(9, [0, 1, 2])
    assert send.next_offer() is None
    send.ready(10, [0, 1, 2, 9])
    assert send.next_offer().token_end == 10


def test_cached_tokens_of_the_receiver_are_not_offered(local_ends: Any) -> None:
    send, _ = local_ends.pair(local_ends.grant(8, 12))
    send.on_opened(Opened(8, 12, 4))
    send.ready(8, [0, 1])
    assert send.next_offer() is None
    send.ready(12, [0, 1, 2])
    assert send.next_offer().blocks == (2,)


def test_window_and_offer_size_are_bounded(local_ends: Any) -> None:
    ends = local_ends
    ends.source.max_offer_bytes = 2 * ends.source_pool.block_bytes + 1
    send, receive = ends.opened(ends.grant(0, 40), window=2)
    send.ready(40, list(range(10)))
    first, second = send.next_offer(), send.next_offer()
    assert (first.blocks, second.blocks) == ((0, 1), (2, 3))
    assert send.next_offer() is None
    assert send.unacknowledged == 2
    plans = [receive.on_offer(first), receive.on_offer(second)]
    third = Offer(2, 16, 24, (4, 5), (0, 0))
    with pytest.raises(InvalidRequestError, match="more than 2"):
        receive.on_offer(third)
    # Copies may end out of order, and so may their Acks come.
    send.on_ack(receive.copy(plans[1]))
    assert send.next_offer() == third
    send.on_ack(receive.copy(plans[0]))
    ends.source.max_offer_bytes = 1
    assert send.next_offer().blocks == (6,)


def test_acks_that_cannot_be(local_ends: Any) -> None:
    send, _ = local_ends.opened(local_ends.grant(0, 4))
    send.ready(4, [0])
    with pytest.raises(InvalidRequestError):
        send.on_ack(Ack(0))
    send.next_offer()
    send.on_ack(Ack(0))
    for sequence in (0, 1):
        with pytest.raises(InvalidRequestError):
            send.on_ack(Ack(sequence))


@pytest.mark.parametrize(
    "opened", [Opened(1, 4, 4), Opened(8, 4, 4), Opened(-4, 4, 4), Opened(0, 4, 0), Opened(4, 4, 3)]
)
def test_opened_that_cannot_be(local_ends: Any, opened: Opened) -> None:
    send, _ = local_ends.pair(local_ends.grant(0, 4))
    with pytest.raises(InvalidRequestError):
        send.on_opened(opened)
    send.on_opened(Opened(0, 4, 4))
    with pytest.raises(InvalidRequestError):
        send.on_opened(Opened(0, 4, 4))


def test_misuse_by_our_own_side(local_ends: Any, tools: Any) -> None:
    send, _ = local_ends.pair(local_ends.grant(0, 8))
    with pytest.raises(InternalError):
        send.commit(tools.record())
    with pytest.raises(InvalidRequestError):
        send.on_committed(Committed(False))
    send.on_opened(Opened(0, 8, 4))
    with pytest.raises(InternalError):
        send.ready(8, [0])
    send.ready(8, [0, 1])
    with pytest.raises(InternalError):
        send.ready(7, [0, 1])
    with pytest.raises(InternalError):
        send.commit(tools.record())
    send.next_offer()
    # Acks may be outstanding: the stream is ordered, and Committed implies them.
    assert send.commit(tools.record()) == Commit(1, 8, tools.record())
    with pytest.raises(InternalError):
        send.commit(tools.record())
    assert send.on_committed(Committed(False))
    assert send.unacknowledged == 0
    with pytest.raises(InternalError):
        SendSession(
            replace(local_ends.sender, layout=replace(tools.LAYOUT, head_dim=16)),
            local_ends.source,
            lease_id="",
            attempt=0,
            target_incarnation="",
        )


def test_a_block_reused_under_the_sender_is_not_offered(ends: Any, tools: Any) -> None:
    send, _ = ends.opened(ends.grant(0, 8))
    send.ready(8, [0, 1])
    tools.reuse(ends.source_pool, 1)
    with pytest.raises(StaleError):
        send.next_offer()


# The receiver's side: Open.


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"target_incarnation": "target-0"}, StaleError),
        ({"model_id": "another"}, IncompatibleError),
        ({"numerics_id": "fast"}, IncompatibleError),
        ({"transport": "carrier"}, IncompatibleError),
        ({"transport": "grpc"}, IncompatibleError),
        ({"lease_id": "no such"}, NotFoundError),
        ({"lease_id": ""}, NotFoundError),
        ({"attempt": 1}, StaleError),
        ({"source_incarnation": "source-0"}, StaleError),
        ({"endpoint": b"?"}, InvalidRequestError),
        ({"endpoint": b"\0" * 16}, UnavailableError),
    ],
    ids=str,
)
def test_open_that_is_refused(local_ends: Any, change: dict[str, Any], error: type[TandemError]) -> None:
    lease = local_ends.grant(0, 4)
    send, receive = local_ends.pair(lease)
    with pytest.raises(error):
        receive.on_open(replace(send.open(), **change))
    assert not lease.committed
    with pytest.raises((StaleError, InvalidRequestError)):
        receive.on_commit(Commit(0, 4, None))


def test_layouts_must_agree(local_ends: Any, tools: Any) -> None:
    send, receive = local_ends.pair(local_ends.grant(0, 4))
    other = replace(tools.LAYOUT, head_dim=16)
    with pytest.raises(IncompatibleError, match=r"head_dim=16.*head_dim=8"):
        receive.on_open(replace(send.open(), layout=other))
    with pytest.raises(InternalError):
        Receiver(local_ends.leases, LocalPool(4, 8), tools.LAYOUT, "m", "n")
    with pytest.raises(InternalError):
        replace(local_ends.receiver, layout=replace(tools.LAYOUT, block_size=8, head_dim=4))


def test_open_comes_first_and_once(local_ends: Any) -> None:
    lease = local_ends.grant(0, 4)
    fresh = ReceiveSession(local_ends.receiver)
    with pytest.raises(InvalidRequestError, match="Open"):
        fresh.on_offer(Offer(0, 0, 4, (0,), (0,)))
    with pytest.raises(InvalidRequestError, match="Open"):
        fresh.on_commit(Commit(0, 4, None))
    fresh.close()
    send, receive = local_ends.opened(lease)
    with pytest.raises(InvalidRequestError, match="second"):
        receive.on_open(send.open())
    another, twin = local_ends.pair(lease)
    with pytest.raises(StaleError):
        twin.on_open(another.open())


def test_a_session_closed_while_it_connects(local_ends: Any) -> None:
    send, receive = local_ends.pair(local_ends.grant(0, 4))
    receive.close()
    with pytest.raises(StaleError):
        receive.on_open(send.open())


# The receiver's side: offers.


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sequence": 0}, "offer.sequence"),
        ({"sequence": 2}, "offer.sequence"),
        ({"token_start": 0, "blocks": (0, 1), "generations": (0, 0)}, "offer.token_start"),
        ({"token_start": 8}, "offer.token_start"),
        ({"token_start": 5}, "offer.token_start"),
        ({"token_end": 4}, "offer.token_start"),
        ({"token_end": 0}, "offer.token_start"),
        ({"token_end": 16}, "offer.token_start"),
        ({"token_end": 1 << 32}, "offer.token_start"),
        ({"token_end": 7}, "offer.token_end"),
        ({"blocks": ()}, "offer.blocks"),
        ({"blocks": (1, 2)}, "offer.blocks"),
        ({"generations": ()}, "offer.blocks"),
        ({"generations": (0, 0)}, "offer.blocks"),
    ],
    ids=str,
)
def test_offers_that_break_the_order(local_ends: Any, change: dict[str, Any], field: str) -> None:
    lease = local_ends.grant(0, 14)
    _, receive = local_ends.opened(lease)
    receive.copy(receive.on_offer(Offer(0, 0, 4, (0,), (0,))))
    good = Offer(1, 4, 8, (1,), (0,))
    with pytest.raises(InvalidRequestError) as caught:
        receive.on_offer(replace(good, **change))
    assert caught.value.field == field
    # What was refused left no trace.
    receive.copy(receive.on_offer(good))
    receive.copy(receive.on_offer(Offer(2, 8, 14, (2, 3), (0, 0))))
    assert not receive.on_commit(Commit(3, 14, record_of(lease))).already_committed


def record_of(lease: Any) -> Record:
    return Record(lease.request_id, "model", [1], SamplingParams(), StopRules(1), [OutputState([2])])


def test_an_offer_below_or_beyond_the_needed_range(local_ends: Any) -> None:
    _, receive = local_ends.opened(local_ends.grant(8, 12))
    for offer in (Offer(0, 4, 8, (0,), (0,)), Offer(0, 4, 12, (0, 1), (0, 0)), Offer(0, 8, 16, (0, 1), (0, 0))):
        with pytest.raises(InvalidRequestError):
            receive.on_offer(offer)


def test_a_session_keeps_no_bytes_of_what_it_has_copied(tools: Any) -> None:
    """Else a long prompt's KV would lie in memory twice until its commit."""
    ends = tools.make_ends("grpc")
    send, receive = ends.opened(ends.grant(0, 8))
    send.ready(4, [0])
    offer = send.next_offer()
    payload = offer.payload
    send.on_ack(receive.copy(receive.on_offer(offer)))
    del offer
    holders = sys.getrefcount(payload) - 2  # this function's name and the argument
    assert holders == 0
    send.ready(8, [0, 1])
    ends.pump(send, receive)
    assert ends.commit(send, receive)


# Commit.


def test_commits_that_are_refused(local_ends: Any) -> None:
    lease = local_ends.grant(0, 8)
    _, receive = local_ends.opened(lease)
    receive.copy(receive.on_offer(Offer(0, 0, 4, (0,), (0,))))
    record = record_of(lease)
    for commit in (Commit(1, 8, record), Commit(1, 4, record), Commit(2, 8, record)):
        with pytest.raises(InvalidRequestError):
            receive.on_commit(commit)
    plan = receive.on_offer(Offer(1, 4, 8, (1,), (0,)))
    with pytest.raises(InternalError):
        receive.on_commit(Commit(2, 8, record))
    receive.copy(plan)
    for commit in (Commit(1, 8, record), Commit(2, 4, record), Commit(2, 8, replace(record, request_id="x"))):
        with pytest.raises(InvalidRequestError):
            receive.on_commit(commit)
    assert not lease.committed
    assert receive.on_commit(Commit(2, 8, record)) == Committed(False)
    assert receive.on_commit(Commit(2, 8, record)) == Committed(True)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_generations_are_checked_again_before_the_commit(mapped_ends: Any, tools: Any, victim: int) -> None:
    lease = mapped_ends.grant(0, 12)
    send, receive = mapped_ends.opened(lease)
    for end in (4, 12):
        send.ready(end, [0, 1, 2])
        mapped_ends.pump(send, receive)
    tools.reuse(mapped_ends.source_pool, victim)
    with pytest.raises(StaleError):
        mapped_ends.commit(send, receive)
    assert not lease.committed


# Attempts that race.


def test_retarget_before_the_commit_wins(ends: Any, tools: Any) -> None:
    lease = ends.grant(0, 8)
    old_send, old = ends.opened(lease)
    old_send.ready(8, [0, 1])
    ends.pump(old_send, old)
    assert not lease.retarget(1)
    sent = [tools.fill(ends.source_pool, block, block) for block in (8, 9)]
    send, receive = ends.opened(lease, attempt=1)
    with pytest.raises(StaleError):
        ends.commit(old_send, old)
    send.ready(8, [8, 9])
    ends.pump(send, receive)
    assert ends.commit(send, receive)
    # The old one, whatever it says now, changes nothing.
    with pytest.raises(StaleError):
        old.on_offer(Offer(1, 8, 12, (2,), (0,)))
    assert old.on_commit(Commit(1, 8, record_of(lease))) == Committed(True)
    assert [tools.read(ends.target_pool, block) for block in lease.blocks] == sent


def test_commit_before_the_retarget_wins(ends: Any) -> None:
    lease = ends.grant(0, 8)
    send, receive = ends.opened(lease)
    send.ready(8, [0, 1])
    ends.pump(send, receive)
    assert ends.commit(send, receive)
    assert lease.retarget(1)
    late, refused = ends.pair(lease, attempt=1)
    with pytest.raises(StaleError) as caught:
        refused.on_open(late.open())
    assert caught.value.reason == "ALREADY_COMMITTED"


@pytest.mark.parametrize("ending", ["session", "lease", "retarget"])
def test_what_ends_during_a_copy_is_not_acknowledged(ends: Any, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    lease = ends.grant(0, 8)
    send, receive = ends.opened(lease)
    send.ready(8, [0, 1])
    plan = receive.on_offer(send.next_offer())
    endings = {"session": receive.close, "lease": lease.close, "retarget": lambda: lease.retarget(1)}
    (view,) = receive._views.ranks
    plain = view.copy

    def copy_then_end(*args: Any) -> None:
        plain(*args)
        endings[ending]()
        assert ends.released == []

    monkeypatch.setattr(view, "copy", copy_then_end)
    with pytest.raises(StaleError):
        receive.copy(plan)
    assert ends.released == (["r"] if ending == "lease" else [])
    with pytest.raises(StaleError):
        receive.copy(plan)
    with pytest.raises(StaleError):
        receive.on_commit(Commit(1, 8, record_of(lease)))
    assert not lease.committed


def test_closing_a_session_leaves_the_lease_to_another_attempt(ends: Any) -> None:
    lease = ends.grant(0, 4)
    _, receive = ends.opened(lease)
    receive.close()
    with pytest.raises(StaleError):
        receive.on_offer(Offer(0, 0, 4, (0,), (0,)))
    assert not lease.retarget(1)
    send, receive = ends.opened(lease, attempt=1)
    send.ready(4, [0])
    ends.pump(send, receive)
    assert ends.commit(send, receive)
