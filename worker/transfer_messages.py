"""The messages of one KV transfer, plain data to protobuf and back: what a sender writes and a receiver reads."""

from __future__ import annotations

from kv_transfer.messages import Ack, Commit, Committed, Offer, Open, Opened
from tandem.errors import InternalError
from tandem.service import wire
from tandem.v1 import kv_transfer_pb2 as pb


def open_to_pb(message: Open) -> pb.TransferRequest:
    """The sender's first message."""
    opening = pb.TransferOpen(
        lease_id=message.lease_id,
        attempt=message.attempt,
        source_incarnation=message.source_incarnation,
        target_incarnation=message.target_incarnation,
        model_id=message.model_id,
        numerics_id=message.numerics_id,
        layout=wire.layout_to_pb(message.layout),
        transport=message.transport,
        endpoint=message.endpoint,
        source_secret=message.secret,
        heartbeats=True,
    )
    return pb.TransferRequest(open=opening)


def open_from_pb(message: pb.TransferOpen) -> Open:
    """Raises InvalidRequestError or IncompatibleError for a layout that can't be."""
    return Open(
        lease_id=message.lease_id,
        attempt=message.attempt,
        source_incarnation=message.source_incarnation,
        target_incarnation=message.target_incarnation,
        model_id=message.model_id,
        numerics_id=message.numerics_id,
        layout=wire.layout_from_pb(message.layout),
        transport=message.transport,
        endpoint=message.endpoint,
        secret=message.source_secret,
    )


def offer_to_pb(message: Offer) -> pb.TransferRequest:
    """Blocks that are ready."""
    offer = pb.TransferOffer(
        sequence=message.sequence,
        token_start=message.token_start,
        token_end=message.token_end,
        blocks=message.blocks,
        generations=message.generations,
        payload=bytes(message.payload),
        checksums=message.checksums,
    )
    return pb.TransferRequest(offer=offer)


def offer_from_pb(message: pb.TransferOffer) -> Offer:
    """Values as they came; the session checks them."""
    return Offer(
        sequence=message.sequence,
        token_start=message.token_start,
        token_end=message.token_end,
        blocks=tuple(message.blocks),
        generations=tuple(message.generations),
        payload=message.payload,
        checksums=tuple(message.checksums),
    )


def commit_to_pb(message: Commit) -> pb.TransferRequest:
    """The sender's last message."""
    commit = pb.TransferCommit(
        offers=message.offers, token_end=message.token_end, record=wire.record_to_pb(message.record)
    )
    return pb.TransferRequest(commit=commit)


def commit_from_pb(message: pb.TransferCommit) -> Commit:
    """Raises InvalidRequestError for a record no worker would send."""
    return Commit(message.offers, message.token_end, wire.record_from_pb(message.record))


def answer_to_pb(answer: Opened | Ack | Committed) -> pb.TransferResponse:
    """What goes back to the sender."""
    if isinstance(answer, Opened):
        opened = pb.TransferOpened(
            needed_start=answer.needed_start, needed_end=answer.needed_end, block_size=answer.block_size
        )
        return pb.TransferResponse(opened=opened)
    if isinstance(answer, Ack):
        return pb.TransferResponse(ack=pb.TransferAck(sequence=answer.sequence))
    return pb.TransferResponse(committed=pb.TransferCommitted(already_committed=answer.already_committed))


def answer_from_pb(message: pb.TransferResponse) -> Opened | Ack | Committed:
    """What the receiver said. Raises InternalError for a message of another version."""
    kind = message.WhichOneof("event")
    if kind == "opened":
        return Opened(message.opened.needed_start, message.opened.needed_end, message.opened.block_size)
    if kind == "ack":
        return Ack(message.ack.sequence)
    if kind == "committed":
        return Committed(message.committed.already_committed)
    raise InternalError("the decode worker sent a message that this version doesn't know", reason="TARGET_PROTOCOL")


def heartbeat_to_pb() -> pb.TransferResponse:
    """The receiver lives."""
    return pb.TransferResponse(heartbeat=pb.TransferHeartbeat())
