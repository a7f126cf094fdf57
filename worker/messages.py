"""What a worker is and how busy it is, as protobuf; KV layouts both ways. For the servicers and `transfer_messages`."""

from __future__ import annotations

import os
from typing import Any

import tandem
from tandem.kv_layout import KvLayout
from tandem.v1 import types_pb2
from worker.identity import WorkerIdentity
from worker.worker import Worker


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


def info_to_pb(identity: WorkerIdentity, role: types_pb2.WorkerRole.ValueType) -> types_pb2.WorkerInfo:
    """What this worker is."""
    return types_pb2.WorkerInfo(
        role=role,
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


def load_to_pb(worker: Worker[Any], *, running_sequences: int, receiving_requests: int = 0) -> types_pb2.WorkerLoad:
    """How busy this worker is now; each service has its own idea of what runs."""
    load = worker.engine.load
    return types_pb2.WorkerLoad(
        incarnation=worker.identity.incarnation,
        steps=worker.engine.steps,
        running_sequences=running_sequences,
        waiting_requests=load.waiting_requests,
        receiving_requests=receiving_requests,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        queued_prefill_tokens=load.queued_prefill_tokens,
        draining=worker.draining,
        prefill_tokens_per_second=worker.engine.prefill_rate,
    )
