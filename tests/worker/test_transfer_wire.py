"""Offers beside protobuf: the same wire, whichever end leaves it to protobuf; nothing is believed before it fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from google.protobuf.message import DecodeError

from kv_transfer.messages import Offer
from tandem.v1 import kv_transfer_pb2 as pb
from worker import transfer_wire
from worker.transfer_messages import offer_from_pb, offer_to_pb
from worker.transfer_wire import Requests, offer_to_wire

PAYLOAD = bytes(range(256)) * 300
OFFER = Offer(3, 64, 96, (7, 900000), (1, 1 << 60), PAYLOAD, (5, 1 << 31))


def same(offer: object, expected: Offer) -> bool:
    return isinstance(offer, Offer) and replace(offer, payload=bytes(offer.payload)) == expected


@pytest.mark.parametrize("payload", [b"", b"x", PAYLOAD, PAYLOAD * 30], ids=len)
def test_protobuf_reads_what_is_written(payload: bytes) -> None:
    offer = replace(OFFER, payload=payload)
    read = pb.TransferRequest.FromString(offer_to_wire(offer))
    assert read == offer_to_pb(offer)
    assert same(offer_from_pb(read.offer), offer)


def test_a_large_offer_is_read_without_a_copy() -> None:
    for data in (offer_to_wire(OFFER), offer_to_pb(OFFER).SerializeToString()):
        offer = Requests.FromString(data)
        assert same(offer, OFFER)
        assert isinstance(offer, Offer)
        assert isinstance(offer.payload, memoryview)
        assert offer.payload.obj is data


def test_what_is_no_large_offer_is_protobufs() -> None:
    small = offer_to_pb(replace(OFFER, payload=b"x"))
    large = pb.TransferRequest(open=pb.TransferOpen(endpoint=PAYLOAD))
    many = pb.TransferRequest(offer=pb.TransferOffer(generations=range(100_000)))
    for message in (small, large, many, pb.TransferRequest()):
        assert Requests.FromString(message.SerializeToString()) == message


def test_an_offer_in_two_parts_is_merged_as_protobuf_does() -> None:
    data = offer_to_wire(OFFER)
    for parts in (data + data, data + b"\x12\x02\x08\x09"):
        assert Requests.FromString(parts) == pb.TransferRequest.FromString(parts)
    inner = offer_to_pb(OFFER).offer.SerializeToString()
    twice = inner + inner
    whole = b"\x12" + transfer_wire._number(len(twice)) + twice
    assert Requests.FromString(whole) == pb.TransferRequest.FromString(whole)


def test_unknown_fields_are_skipped() -> None:
    inner = offer_to_pb(OFFER).offer.SerializeToString() + b"\x78\x05"
    data = b"\x12" + transfer_wire._number(len(inner)) + inner
    assert same(Requests.FromString(data), OFFER)


@pytest.mark.parametrize("cut", [1, 100, len(PAYLOAD) - 1])
def test_truncated_offers_are_refused(cut: int) -> None:
    for data in (offer_to_wire(OFFER), offer_to_pb(OFFER).SerializeToString()):
        with pytest.raises(DecodeError):
            Requests.FromString(data[:-cut])


@pytest.mark.parametrize("at", range(48))
@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_means_what_it_means_to_protobuf(at: int, bit: int) -> None:
    """Every bit of what stands before the payload, in an offer as we write it."""
    data = bytearray(offer_to_wire(OFFER))
    data[at] ^= 1 << bit
    try:
        expected = pb.TransferRequest.FromString(bytes(data))
    except DecodeError:
        with pytest.raises(DecodeError):
            Requests.FromString(bytes(data))
        return
    read = Requests.FromString(bytes(data))
    if isinstance(read, Offer):
        assert same(read, offer_from_pb(expected.offer))
        assert expected.WhichOneof("event") == "offer"
    else:
        assert read == expected


def test_numbers_end() -> None:
    for value in (0, 127, 128, 1 << 40):
        assert transfer_wire._read_number(memoryview(transfer_wire._number(value)), 0)[0] == value
    with pytest.raises(IndexError):
        transfer_wire._read_number(memoryview(b"\xff" * 20), 0)
