"""Plain data of this room and of kv_transfer to protobuf and back. Used by the servicers only."""

from __future__ import annotations

import os
from collections.abc import Iterable

import tandem
from decode_service.events import Ended, Finished
from decode_service.streams import Item, Pulse, Retargeted
from decode_service.worker import DecodeWorker, WorkerIdentity
from kv_transfer.layout import KvLayout
from kv_transfer.messages import Ack, Commit, Committed, Offer, Open, Opened
from tandem.record import TokenDelta
from tandem.service import wire
from tandem.v1 import decode_pb2, kv_transfer_pb2, types_pb2


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


def open_from_pb(message: kv_transfer_pb2.TransferOpen) -> Open:
    """The sender's first message."""
    return Open(
        lease_id=message.lease_id,
        attempt=message.attempt,
        source_incarnation=message.source_incarnation,
        target_incarnation=message.target_incarnation,
        model_id=message.model_id,
        numerics_id=message.numerics_id,
        layout=layout_from_pb(message.layout),
        transport=message.transport,
        endpoint=message.endpoint,
    )


def offer_from_pb(message: kv_transfer_pb2.TransferOffer) -> Offer:
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


def commit_from_pb(message: kv_transfer_pb2.TransferCommit) -> Commit:
    """Raises InvalidRequestError for a record no worker would send."""
    return Commit(message.offers, message.token_end, wire.record_from_pb(message.record))


def transfer_answer(answer: Opened | Ack | Committed) -> kv_transfer_pb2.TransferResponse:
    """What goes back to the sender."""
    if isinstance(answer, Opened):
        opened = kv_transfer_pb2.TransferOpened(needed_start=answer.needed_start, needed_end=answer.needed_end)
        return kv_transfer_pb2.TransferResponse(opened=opened)
    if isinstance(answer, Ack):
        return kv_transfer_pb2.TransferResponse(ack=kv_transfer_pb2.TransferAck(sequence=answer.sequence))
    committed = kv_transfer_pb2.TransferCommitted(already_committed=answer.already_committed)
    return kv_transfer_pb2.TransferResponse(committed=committed)


def heartbeat_to_pb(steps: int) -> decode_pb2.DecodeResponse:
    """The engine lives; `steps` launched so far."""
    return decode_pb2.DecodeResponse(heartbeat=decode_pb2.DecodeHeartbeat(steps=steps))


def decode_responses(items: Iterable[Item]) -> list[decode_pb2.DecodeResponse]:
    """Stream items as messages, in order; neighbouring tokens share one."""
    responses: list[decode_pb2.DecodeResponse] = []
    for item in items:
        if isinstance(item, TokenDelta):
            if not responses or responses[-1].WhichOneof("event") != "tokens":
                responses.append(decode_pb2.DecodeResponse(tokens=decode_pb2.DecodeTokens()))
            responses[-1].tokens.deltas.append(wire.delta_to_pb(item))
        elif isinstance(item, Pulse):
            responses.append(heartbeat_to_pb(item.steps))
        elif isinstance(item, Retargeted):
            responses.append(decode_pb2.DecodeResponse(retargeted=_retargeted_to_pb(item)))
        elif isinstance(item, Finished):
            finished = decode_pb2.DecodeFinished(index=item.index, finish_reason=wire.finish_reason_to_pb(item.reason))
            responses.append(decode_pb2.DecodeResponse(finished=finished))
        elif isinstance(item, Ended):
            responses.append(decode_pb2.DecodeResponse(end=decode_pb2.DecodeEnd(preemptions=item.preemptions)))
    return responses


def _retargeted_to_pb(item: Retargeted) -> decode_pb2.DecodeRetargeted:
    return decode_pb2.DecodeRetargeted(
        attempt=item.attempt,
        status=decode_pb2.RETARGET_STATUS_COMMITTED if item.committed else decode_pb2.RETARGET_STATUS_ACCEPTED,
        needed_start=item.needed_start,
        needed_end=item.needed_end,
    )


def info_to_pb(identity: WorkerIdentity) -> types_pb2.WorkerInfo:
    """What this worker is."""
    return types_pb2.WorkerInfo(
        role=types_pb2.WORKER_ROLE_DECODE,
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


def load_to_pb(worker: DecodeWorker) -> types_pb2.WorkerLoad:
    """How busy this worker is now."""
    load = worker.engine.load
    return types_pb2.WorkerLoad(
        incarnation=worker.identity.incarnation,
        steps=worker.engine.steps,
        running_sequences=load.running_sequences,
        waiting_requests=load.waiting_requests,
        receiving_requests=load.receiving_requests,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        queued_prefill_tokens=load.queued_prefill_tokens,
        draining=worker.draining,
        prefill_tokens_per_second=worker.engine.prefill_rate,
    )
