"""PrefillService: one call per request, which is the request's lease here. Protobuf stops in this file.

Life of a `Prefill` call: checks -> into the engine's queue, Accepted -> the transfer to the decode worker runs beside
(`sender`), Progress each second while the engine turns -> FirstTokens as soon as they are sampled -> Done when the
decode worker has committed. However it ends, `close_job` frees everything.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from prefill_service.events import Admission
from prefill_service.job import Job
from prefill_service.sender import TransferResult
from prefill_service.worker import PrefillWorker, Target
from tandem.service import wire
from tandem.service.logging import bind_request
from tandem.v1 import prefill_pb2, prefill_pb2_grpc, types_pb2
from worker import messages
from worker.writing import until_first

Context = grpc.aio.ServicerContext[Any, Any]
PROGRESS_SECONDS = 1.0


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Raises TandemErrors; the server's interceptor maps them."""

    def __init__(self, worker: PrefillWorker) -> None:
        """`worker` is started and stopped by the wiring."""
        self._worker = worker

    async def Prefill(  # type: ignore[override]  # noqa: N802
        self, request: prefill_pb2.PrefillRequest, context: Context
    ) -> None:
        """See proto/tandem/v1/prefill.proto."""
        self._worker.identity.check_incarnation(request.incarnation)
        record = wire.record_from_pb(request.record)
        with bind_request(record.request_id, record.tenant):
            job = self._worker.open_job(record, target_from_pb(request.target))
            try:
                await self._run(job, context)
            finally:
                self._worker.close_job(job)

    async def _run(self, job: Job, context: Context) -> None:
        answer = self._worker.engine.submit(job.key, job.record)
        try:
            # Apart from the first message: a write given up before it sent the headers would take the status with it.
            await context.send_initial_metadata(())
            await until_first(asyncio.create_task(self._serve(job, answer, context)), job.failed)
        finally:
            answer.cancel()

    async def _serve(self, job: Job, answer: asyncio.Future[Admission], context: Context) -> None:
        admission = await self._admitted(job, answer, context)
        job.start_transfer(context.time_remaining())
        await context.write(_accepted(admission))
        clock = asyncio.get_running_loop().time
        first_tokens_sent, beat = False, clock() + PROGRESS_SECONDS
        while True:
            job.news.clear()
            if job.deltas is not None and not first_tokens_sent:
                first_tokens_sent = True
                deltas = [wire.delta_to_pb(delta) for delta in job.deltas]
                tokens = prefill_pb2.PrefillFirstTokens(deltas=deltas)
                await context.write(prefill_pb2.PrefillResponse(first_tokens=tokens))
            if job.result is not None:
                await context.write(_done(job, job.result))
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.news.wait(), max(0.0, beat - clock()))
            if clock() >= beat:
                beat = clock() + PROGRESS_SECONDS
                if self._worker.engine.alive:
                    await context.write(self._progress(job))

    async def _admitted(self, job: Job, answer: asyncio.Future[Admission], context: Context) -> Admission:
        """The engine answers after the step that runs; until then nobody may take the silence for its end."""
        while not (await asyncio.wait({answer}, timeout=PROGRESS_SECONDS))[0]:
            if self._worker.engine.alive:
                await context.write(self._progress(job))
        return answer.result()

    def _progress(self, job: Job) -> prefill_pb2.PrefillResponse:
        steps = self._worker.engine.steps
        return prefill_pb2.PrefillResponse(
            progress=prefill_pb2.PrefillProgress(steps=steps, computed_tokens=job.computed_tokens)
        )

    async def GetPrefillInfo(  # noqa: N802
        self, request: prefill_pb2.GetPrefillInfoRequest, context: Context
    ) -> prefill_pb2.GetPrefillInfoResponse:
        """What this worker is."""
        info = messages.info_to_pb(self._worker.identity, types_pb2.WORKER_ROLE_PREFILL)
        return prefill_pb2.GetPrefillInfoResponse(info=info)

    async def WatchPrefillLoad(  # noqa: N802
        self, request: prefill_pb2.WatchPrefillLoadRequest, context: Context
    ) -> AsyncIterator[prefill_pb2.WatchPrefillLoadResponse]:
        """On change, at most 20 a second; at least one a second, as long as the engine turns."""
        async with aclosing(self._worker.load_changes()) as changes:
            async for _ in changes:
                yield prefill_pb2.WatchPrefillLoadResponse(load=self._load())

    def _load(self) -> types_pb2.WorkerLoad:
        return messages.load_to_pb(self._worker, running_sequences=self._worker.engine.load.running_requests)


def target_from_pb(message: prefill_pb2.TransferTarget) -> Target:
    """Raises InvalidRequestError or IncompatibleError for a layout that can't be."""
    return Target(
        lease_id=message.lease_id,
        attempt=message.attempt,
        address=message.address,
        incarnation=message.incarnation,
        needed_start=message.needed_start,
        needed_end=message.needed_end,
        layout=wire.layout_from_pb(message.layout),
        transports=tuple(message.transports),
        host_id=message.host_id,
        convert_kv_dtype=message.convert_kv_dtype,
    )


def _accepted(admission: Admission) -> prefill_pb2.PrefillResponse:
    return prefill_pb2.PrefillResponse(accepted=prefill_pb2.PrefillAccepted(cached_tokens=admission.cached_tokens))


def _done(job: Job, result: TransferResult) -> prefill_pb2.PrefillResponse:
    status = prefill_pb2.COMMIT_STATUS_COMMITTED if result.committed else prefill_pb2.COMMIT_STATUS_ALREADY_COMMITTED
    return prefill_pb2.PrefillResponse(
        done=prefill_pb2.PrefillDone(
            status=status,
            bytes_transferred=result.bytes_sent,
            prefill_seconds=job.prefill_seconds,
            transfer_seconds=result.seconds,
        )
    )
