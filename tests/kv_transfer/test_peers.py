"""A sender's incarnation and endpoints belong to whoever first opened a transfer as it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kv_transfer.messages import Open
from kv_transfer.peers import MAX_ENDPOINT_BYTES, NOBODY, Identity, SenderTable
from kv_transfer.session import ReceiveSession
from tandem.errors import InvalidRequestError, NotFoundError, PermissionDeniedError, TandemError
from tandem.kv_layout import KvLayout

LAYOUT = KvLayout(block_size=4, dtype="float32", num_layers=1, num_kv_heads=1, head_dim=2)
ANN, BEN = Identity(frozenset({"tandem-prefill", "ann"}), "f1"), Identity(frozenset({"tandem-prefill", "ben"}), "f2")
SECRET, OTHER = b"s" * 32, b"o" * 32


def opening(**changes: Any) -> Open:
    values = {"transport": "shm", "endpoint": b"ann's", "secret": SECRET, "source_incarnation": "a", **changes}
    return Open(lease_id="l", attempt=0, target_incarnation="t", model_id="m", numerics_id="n", layout=LAYOUT, **values)


def bound(identity: Identity = ANN, **changes: Any) -> SenderTable:
    table = SenderTable()
    table.bind(identity, opening(**changes))
    return table


def test_the_same_sender_comes_again() -> None:
    """With another transport too, whose endpoint is its own from then on."""
    table = bound()
    table.check(ANN, opening())
    table.bind(ANN, opening(transport="grpc", endpoint=b""))
    table.bind(ANN, opening(transport="nixl", endpoint=b"metadata"))
    with pytest.raises(PermissionDeniedError, match="had another endpoint for nixl before"):
        table.check(ANN, opening(transport="nixl", endpoint=b"metadata "))
    with pytest.raises(PermissionDeniedError, match="had another endpoint for grpc before"):
        table.check(ANN, opening(transport="grpc", endpoint=b"x"))
    assert len(table) == 1


@pytest.mark.parametrize(
    ("identity", "changes", "words"),
    [
        (BEN, {}, "came with a certificate of ann, tandem-prefill, now of ben, tandem-prefill"),
        (NOBODY, {}, "now of nobody"),
        (ANN, {"secret": OTHER}, "another process's"),
        (ANN, {"secret": b""}, "another process's"),
        (ANN, {"endpoint": b"Ann's"}, "had another endpoint for shm before"),
        (ANN, {"endpoint": b""}, "had another endpoint for shm before"),
        (ANN, {"source_incarnation": "b"}, "presents the shm endpoint of incarnation 'a'"),
        (BEN, {"source_incarnation": "b", "secret": OTHER}, "presents the shm endpoint of incarnation 'a'"),
    ],
)
def test_somebody_else_is_refused(identity: Identity, changes: dict[str, Any], words: str) -> None:
    """Whether it is checked or bound; what was known stays known."""
    table = bound()
    for step in (table.check, table.bind):
        with pytest.raises(PermissionDeniedError, match=words) as caught:
            step(identity, opening(**changes))
        assert caught.value.reason == "PEER_MISMATCH"
        for secret in (SECRET, OTHER):
            assert secret.decode() not in str(caught.value)
    table.check(ANN, opening())


def test_a_renewed_certificate_is_the_same_senders() -> None:
    """By the secret of the process; without one another fingerprint is another certificate."""
    renewed = replace(ANN, fingerprint="f3")
    table = bound()
    table.bind(renewed, opening())
    table.check(ANN, opening())
    old = bound(secret=b"")
    old.check(ANN, opening(secret=b""))
    with pytest.raises(PermissionDeniedError, match="another certificate, and without a secret"):
        old.check(renewed, opening(secret=b""))


def test_two_senders_of_one_certificate_are_two() -> None:
    table = bound()
    table.bind(ANN, opening(source_incarnation="b", secret=OTHER, endpoint=b"b's"))
    with pytest.raises(PermissionDeniedError, match="another process's"):
        table.check(ANN, opening(secret=OTHER))


def test_parts_of_an_endpoint_belong_to_one_sender() -> None:
    """Of one transport: another may call something else by the same bytes."""
    table = SenderTable()
    for step in (table.check, table.bind):
        step(ANN, opening(transport="nixl"), [b"agent", b"address"])
    table.check(ANN, opening(transport="nixl"), [b"agent", b"address"])
    theft = opening(transport="nixl", source_incarnation="b", endpoint=b"ben's", secret=OTHER)
    for claims in ([b"agent"], [b"other", b"address"]):
        for step in (table.check, table.bind):
            with pytest.raises(PermissionDeniedError, match="presents the nixl endpoint of incarnation 'a'"):
                step(BEN, theft, claims)
    table.bind(BEN, theft, [b"other"])
    table.bind(BEN, opening(source_incarnation="c", endpoint=b"c's", secret=OTHER), [b"agent"])


def test_entries_are_bounded_and_leave_nothing() -> None:
    table = SenderTable(most=2)
    for name in ("a", "b", "a", "c"):
        table.bind(ANN, opening(source_incarnation=name, endpoint=name.encode()), [name.encode() * 2])
    assert len(table) == 2
    with pytest.raises(PermissionDeniedError):
        table.check(BEN, opening(source_incarnation="a", endpoint=b"a"))
    table.bind(BEN, opening(source_incarnation="d", endpoint=b"b"), [b"bb"])
    assert len(table._owners) == 4


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"endpoint": b"x" * (MAX_ENDPOINT_BYTES + 1)}, "open.endpoint"),
        ({"source_incarnation": "x" * 257}, "open.source_incarnation"),
        ({"secret": b"short"}, "open.source_secret"),
        ({"secret": b"x" * 65}, "open.source_secret"),
    ],
)
def test_sizes(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SenderTable().check(ANN, opening(**changes))
    assert caught.value.field == field


def test_secrets_are_in_no_repr() -> None:
    table = bound()
    for thing in (opening(), table._senders["a"]):
        assert repr(SECRET)[2:-1] not in repr(thing)
        assert "ann's" not in repr(thing)


# In a transfer.


def receive(ends: Any, identity: Identity) -> ReceiveSession:
    return ReceiveSession(ends.receiver, identity=identity)


def test_transfers_of_one_sender_are_held_to_it(ends: Any) -> None:
    """Another certificate can't take the incarnation over; its lease stays free for the real sender."""
    first = ends.grant(0, 4)
    send, _ = ends.pair(first)
    receive(ends, ANN).on_open(send.open())
    second = ends.grant(0, 4, first_block=4)
    send, _ = ends.pair(second)
    with pytest.raises(PermissionDeniedError):
        receive(ends, BEN).on_open(send.open())
    session = receive(ends, ANN)
    send.on_opened(session.on_open(send.open()))
    send.ready(4, [3])
    assert ends.pump(send, session) == 1


def test_what_could_not_connect_is_not_bound(ends: Any) -> None:
    """Neither without a lease nor without a pool behind the endpoint: nobody can be shut out like that."""
    lease = ends.grant(0, 4)
    send, _ = ends.pair(lease)
    message = send.open()
    with pytest.raises(NotFoundError):
        receive(ends, BEN).on_open(replace(message, lease_id="none"))
    with pytest.raises(TandemError):
        receive(ends, BEN).on_open(replace(message, endpoint=b"nowhere"))
    lease.retarget(1)
    receive(ends, ANN).on_open(replace(message, attempt=1))


def test_endpoints_stay_the_same_bytes(ends: Any) -> None:
    """What the table relies on."""
    assert ends.source.endpoint() == ends.source.endpoint()
