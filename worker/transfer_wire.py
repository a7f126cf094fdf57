"""Transfer requests as bytes, with the blocks' own bytes outside of protobuf, which would copy them again and again.

The wire is protobuf's, field for field (proto/tandem/v1/kv_transfer.proto): either end may be of a version that leaves
everything to protobuf.
"""

from __future__ import annotations

from dataclasses import replace

from kv_transfer.messages import Offer
from tandem.v1 import kv_transfer_pb2 as pb
from worker.transfer_messages import offer_from_pb, offer_to_pb

_VARINT, _BYTES = 0, 2
_OFFER_TAG = pb.TransferRequest.OFFER_FIELD_NUMBER << 3 | _BYTES
_PAYLOAD_TAG = pb.TransferOffer.PAYLOAD_FIELD_NUMBER << 3 | _BYTES
_LEAST_BYTES = 1 << 14
"""Smaller messages are protobuf's."""
_MOST_FIELDS = 16
"""An offer of ours has 7 at most; one that is written in another way is protobuf's, too."""


def offer_to_wire(message: Offer) -> bytes:
    """A TransferRequest with an offer. One copy of the payload, so call it in a worker thread."""
    if not message.payload:
        return offer_to_pb(message).SerializeToString()
    rest = offer_to_pb(replace(message, payload=b"")).offer.SerializeToString()
    head = bytes([_PAYLOAD_TAG]) + _number(len(message.payload))
    size = len(rest) + len(head) + len(message.payload)
    return b"".join((bytes([_OFFER_TAG]), _number(size), rest, head, message.payload))


class Requests:
    """Stands where a protobuf message class would, as a servicer's deserializer."""

    DESCRIPTOR = pb.TransferRequest.DESCRIPTOR

    @classmethod
    def FromString(cls, data: bytes) -> pb.TransferRequest | Offer:  # noqa: N802  # protobuf's name
        """A large offer as an Offer whose payload is a view of `data`; whatever else as protobuf's message.

        Raises protobuf's DecodeError.
        """
        offer = _large_offer(data) if len(data) >= _LEAST_BYTES else None
        return offer if offer is not None else pb.TransferRequest.FromString(data)


def _large_offer(data: bytes) -> Offer | None:
    """None unless `data` is one offer with one payload, in plain fields."""
    view = memoryview(data)
    try:
        if data[0] != _OFFER_TAG:
            return None
        size, start = _read_number(view, 1)
        span = _payload_span(view, start) if start + size == len(data) else None
    except IndexError:
        return None
    if span is None:
        return None
    tag, first, end = span
    rest = pb.TransferOffer.FromString(data[start:tag] + data[end:])
    return replace(offer_from_pb(rest), payload=view[first:end])


def _payload_span(view: memoryview, at: int) -> tuple[int, int, int] | None:
    """Where the payload's tag, its first byte and its end are; None if there isn't exactly one."""
    found: tuple[int, int, int] | None = None
    for _ in range(_MOST_FIELDS):
        if at == len(view):
            return found
        tag, (kind, value, after) = at, _read_field(view, at + 1)
        if view[tag] == _PAYLOAD_TAG:
            if found is not None:
                return None
            found = tag, after, after + value
        at = after + value if kind == _BYTES else after
        if kind not in (_VARINT, _BYTES) or view[tag] >= 0x80 or at > len(view):
            return None
    return None


def _read_field(view: memoryview, at: int) -> tuple[int, int, int]:
    """Kind of the field whose tag lies before `at`, its number or length, and what follows that."""
    value, after = _read_number(view, at)
    return view[at - 1] & 7, value, after


def _number(value: int) -> bytes:
    """A varint."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_number(view: memoryview, at: int) -> tuple[int, int]:
    """A varint and where it ends. Raises IndexError at the end of the data, or for one that is too long."""
    value = 0
    for shift in range(0, 63, 7):
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError
