"""What a worker is and how busy it is, as protobuf. For the servicers."""

from __future__ import annotations

import os
from typing import Any

import tandem
from tandem.service import wire
from tandem.v1 import types_pb2
from worker.identity import WorkerIdentity
from worker.worker import Worker


def info_to_pb(identity: WorkerIdentity, role: types_pb2.WorkerRole.ValueType) -> types_pb2.WorkerInfo:
    """What this worker is."""
    return types_pb2.WorkerInfo(
        role=role,
        incarnation=identity.incarnation,
        model_id=identity.model_id,
        model_name=identity.model_name,
        layout=wire.layout_to_pb(identity.layout),
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
        host_id=identity.host_id,
        convert_kv_dtype=identity.convert_kv_dtype,
        proposers=identity.proposers,
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
