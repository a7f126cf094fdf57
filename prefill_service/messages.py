"""Plain data of this room and of kv_transfer to protobuf and back. Used by the servicer and the sender only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import tandem
from kv_transfer.layout import KvLayout
from kv_transfer.messages import Ack, Commit, Committed, Offer, Open, Opened
from prefill_service.identity import WorkerIdentity
from tandem.errors import InternalError
from tandem.record import OutputState, Record, TokenDelta
from tandem.service import wire
from tandem.v1 import kv_transfer_pb2, types_pb2


def layout_to_pb(layout: KvLayout) -> types_pb2.KvLayout:
    """With the derived fields, for people and for `layout_from_pb`."""
    return types_pb2.KvLayout(
        block_size=layout.block_size,
        dtype=layout.dtype,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        order=layout.order,
        block_bytes=layout.block_bytes,
        layout_id=layout.layout_id,
    )


def layout_from_pb(message: types_pb2.KvLayout) -> KvLayout:
    """Raises InvalidRequestError or IncompatibleError for a layout that can't be."""
    layout = KvLayout(
        block_size=message.block_size,
        dtype=message.dtype,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        order=message.order,
    )
    return layout.check_wire(message.block_bytes, message.layout_id)


def open_to_bytes(message: Open) -> bytes:
    """A serialized TransferRequest, like the next two: so it costs a worker thread's time, not the event loop's."""
    opening = kv_transfer_pb2.TransferOpen(
        lease_id=message.lease_id,
        attempt=message.attempt,
        source_incarnation=message.source_incarnation,
        target_incarnation=message.target_incarnation,
        model_id=message.model_id,
        numerics_id=message.numerics_id,
        layout=layout_to_pb(message.layout),
        transport=message.transport,
        endpoint=message.endpoint,
    )
    return kv_transfer_pb2.TransferRequest(open=opening).SerializeToString()


def offer_to_bytes(message: Offer) -> bytes:
    """See `open_to_bytes`."""
    offer = kv_transfer_pb2.TransferOffer(
        sequence=message.sequence,
        token_start=message.token_start,
        token_end=message.token_end,
        blocks=message.blocks,
        generations=message.generations,
        payload=message.payload,
        checksums=message.checksums,
    )
    return kv_transfer_pb2.TransferRequest(offer=offer).SerializeToString()


def commit_to_bytes(message: Commit) -> bytes:
    """See `open_to_bytes`."""
    commit = kv_transfer_pb2.TransferCommit(
        offers=message.offers, token_end=message.token_end, record=wire.record_to_pb(message.record)
    )
    return kv_transfer_pb2.TransferRequest(commit=commit).SerializeToString()


def answer_from_pb(message: kv_transfer_pb2.TransferResponse) -> Opened | Ack | Committed:
    """What the receiver said. Raises InternalError for a message of another version."""
    kind = message.WhichOneof("event")
    if kind == "opened":
        return Opened(message.opened.needed_start, message.opened.needed_end)
    if kind == "ack":
        return Ack(message.ack.sequence)
    if kind == "committed":
        return Committed(message.committed.already_committed)
    raise InternalError("the decode worker sent a message that this version doesn't know", reason="TARGET_PROTOCOL")


def with_first_tokens(record: Record, deltas: Sequence[TokenDelta]) -> Record:
    """A copy of `record` whose outputs have the tokens of `deltas`; the original is left as it is."""
    outputs = [OutputState(list(o.token_ids), list(o.logprobs), o.finish_reason) for o in record.outputs]
    for delta in deltas:
        outputs[delta.index].token_ids.extend(delta.token_ids)
        outputs[delta.index].logprobs.extend(delta.logprobs)
    return replace(record, outputs=outputs)


def info_to_pb(identity: WorkerIdentity) -> types_pb2.WorkerInfo:
    """What this worker is."""
    return types_pb2.WorkerInfo(
        role=types_pb2.WORKER_ROLE_PREFILL,
        incarnation=identity.incarnation,
        model_id=identity.model_id,
        model_name=identity.model_name,
        layout=layout_to_pb(identity.layout),
        numerics_id=identity.numerics_id,
        max_context=identity.max_context,
        vocab_size=identity.vocab_size,
        eos_token_ids=identity.eos_token_ids,
        transports=identity.transports,
        total_blocks=identity.total_blocks,
        max_sequences=identity.max_sequences,
        version=tandem.__version__,
        pid=os.getpid(),
        metrics_address=identity.metrics_address,
        architecture=identity.architecture,
        quantization=identity.quantization,
    )
