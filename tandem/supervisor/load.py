"""How busy workers are, as `tandem status` shows it: the first load report of each worker, asked when somebody asks."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from tandem.service.channel import open_service_channel
from tandem.service.tls import Tls
from tandem.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2

LOAD_SECONDS = 2.0
"""A worker reports at once when asked; one that says nothing for this long is not worth waiting for."""

FIELDS = (
    "free_blocks",
    "total_blocks",
    "running_sequences",
    "waiting_requests",
    "receiving_requests",
    "queued_prefill_tokens",
    "draining",
    "steps",
)


async def with_loads(workers: list[dict[str, Any]], tls: Tls | None = None) -> list[dict[str, Any]]:
    """The same descriptions with `load`: an object of FIELDS, or None for a worker that doesn't answer and for
    gateways, which have no engine. `tls`: how to call them.
    """
    loads = await asyncio.gather(*(_load_of(worker, tls) for worker in workers))
    return [{**worker, "load": load} for worker, load in zip(workers, loads, strict=True)]


async def _load_of(worker: dict[str, Any], tls: Tls | None) -> dict[str, Any] | None:
    if worker["role"] == "gateway" or not worker["address"]:
        return None
    try:
        load = await first_report(worker["role"], worker["address"], tls)
    except (grpc.RpcError, StopAsyncIteration):
        return None
    return {field: getattr(load, field) for field in FIELDS}


async def first_report(role: str, address: str, tls: Tls | None = None) -> types_pb2.WorkerLoad:
    """A prefill or decode worker's load now. Raises grpc.RpcError (after LOAD_SECONDS at most) or StopAsyncIteration
    when it gives none.
    """
    async with open_service_channel(address, role, tls) as channel:
        call: Any
        if role == "prefill":
            prefill = prefill_pb2_grpc.PrefillServiceStub(channel)
            call = prefill.WatchPrefillLoad(prefill_pb2.WatchPrefillLoadRequest(), timeout=LOAD_SECONDS)
        else:
            decode = decode_pb2_grpc.DecodeServiceStub(channel)
            call = decode.WatchDecodeLoad(decode_pb2.WatchDecodeLoadRequest(), timeout=LOAD_SECONDS)
        try:
            response = await anext(aiter(call))
        finally:
            call.cancel()
        load: types_pb2.WorkerLoad = response.load
        return load
