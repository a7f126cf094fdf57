"""DecodeService: one stream per request, which is the request's lease. Protobuf stops here.

Life of a `Decode` call: Start -> checks, admission on the engine thread, a lease where a prefill worker will send ->
Admitted -> the writer sends what the engine produces while the reader takes Retarget and Finish -> End. However it
ends, `close_stream` frees everything. The client's half-close ends only the reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc

from decode_service import messages
from decode_service.events import Admission
from decode_service.feeds import Feed
from decode_service.streams import OutputStream, Retargeted
from decode_service.worker import HEARTBEAT_SECONDS, DecodeWorker
from kv_transfer.leases import COPY_WAIT_SECONDS, Lease
from tandem.errors import (
    DeadlineError,
    IncompatibleError,
    InternalError,
    InvalidRequestError,
    TandemError,
    UnavailableError,
)
from tandem.record import Record
from tandem.service import wire
from tandem.service.logging import bind_request, get_logger
from tandem.v1 import decode_pb2, decode_pb2_grpc, types_pb2
from worker.messages import info_to_pb, load_to_pb
from worker.writing import until_first

_log = get_logger(__name__)
Requests = AsyncIterator[decode_pb2.DecodeRequest]
Context = grpc.aio.ServicerContext[Any, Any]
FIRST_MESSAGE_SECONDS = 10.0


@dataclass(slots=True)
class _Call:
    """One Decode call. `lease` is None when nothing is transferred."""

    key: str
    stream: OutputStream
    record: Record
    attempt: int
    lease: Lease | None = None
    local: bool = False
    """The prompt is computed here: nobody may be asked for it any more."""


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Raises TandemErrors; the server's interceptor maps them."""

    def __init__(self, worker: DecodeWorker) -> None:
        """`worker` is started and stopped by the wiring."""
        self._worker = worker

    async def Decode(  # type: ignore[override]  # noqa: N802
        self, request_iterator: Requests, context: Context
    ) -> None:
        """See proto/tandem/v1/decode.proto."""
        start = await first_message(request_iterator)
        record = self._check_start(start)
        key, stream = self._worker.open_stream(start.feed_id, start.feed_number)
        call = _Call(key, stream, record, start.attempt)
        with bind_request(record.request_id, record.tenant):
            try:
                local = start.source == decode_pb2.PREFILL_SOURCE_LOCAL
                await context.write(await self._admit(call, context, local=local))
                await self._serve(call, request_iterator, context)
            finally:
                self._worker.close_stream(key, call.lease)

    async def WatchTokens(  # type: ignore[override]  # noqa: N802
        self, request: decode_pb2.WatchTokensRequest, context: Context
    ) -> None:
        """See proto/tandem/v1/decode.proto."""
        self._worker.identity.check_incarnation(request.incarnation)
        self._worker.check_open()
        with self._worker.feeds.opened(request.feed_id) as feed:
            await context.write(decode_pb2.WatchTokensResponse())
            await until_first(asyncio.create_task(_write_feed(feed, context)), feed.overflowed)

    async def GetDecodeInfo(  # noqa: N802
        self, request: decode_pb2.GetDecodeInfoRequest, context: Context
    ) -> decode_pb2.GetDecodeInfoResponse:
        """What this worker is."""
        info = info_to_pb(self._worker.identity, types_pb2.WORKER_ROLE_DECODE)
        return decode_pb2.GetDecodeInfoResponse(info=info)

    async def WatchDecodeLoad(  # noqa: N802
        self, request: decode_pb2.WatchDecodeLoadRequest, context: Context
    ) -> AsyncIterator[decode_pb2.WatchDecodeLoadResponse]:
        """On change, at most 20 a second; at least one a second, as long as the engine turns."""
        async with aclosing(self._worker.load_changes()) as changes:
            async for _ in changes:
                yield decode_pb2.WatchDecodeLoadResponse(load=self._load())

    def _load(self) -> types_pb2.WorkerLoad:
        load = self._worker.engine.load
        return load_to_pb(
            self._worker, running_sequences=load.running_sequences, receiving_requests=load.receiving_requests
        )

    def _check_start(self, start: decode_pb2.DecodeStart) -> Record:
        identity = self._worker.identity
        identity.check_incarnation(start.incarnation)
        if start.source not in (decode_pb2.PREFILL_SOURCE_REMOTE, decode_pb2.PREFILL_SOURCE_LOCAL):
            raise InvalidRequestError("source must be REMOTE or LOCAL", field="start.source")
        record = wire.record_from_pb(start.record)
        if record.model_id != identity.model_id:
            raise IncompatibleError(
                f"the record is for model {record.model_id!r}, not for {identity.model_id!r}", reason="MODEL_MISMATCH"
            )
        return record

    async def _admit(self, call: _Call, context: Context, *, local: bool) -> decode_pb2.DecodeResponse:
        answer = self._worker.engine.call_with_events(
            lambda scheduler: scheduler.admit(call.key, call.record, local=local)
        )
        try:
            # Apart from the first message: a write given up before it sent the headers would take the status with it.
            await context.send_initial_metadata(())
            # The engine answers after the step that runs; until then nobody may take the silence for its end.
            while not (await asyncio.wait({answer}, timeout=HEARTBEAT_SECONDS))[0]:
                if self._worker.engine.alive:
                    await context.write(messages.heartbeat_to_pb(self._worker.engine.steps))
            admitted = answer.result()
        finally:
            answer.cancel()
        if not local and not call.stream.ended:
            call.lease = self._worker.grant(call.key, admitted, call.record.request_id, call.attempt)
        return _admitted_to_pb(call, admitted)

    async def _serve(self, call: _Call, requests: Requests, context: Context) -> None:
        """Writes and reads until the end, or until the stream fails, even while a write is held up by the client."""
        reader = asyncio.create_task(self._read(call, requests))
        try:
            await until_first(asyncio.create_task(_write(call.stream, context)), call.stream.failed)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, call: _Call, requests: Requests) -> None:
        """Takes commands until the client closes its half. A bad one ends the request."""
        try:
            async for request in requests:
                await self._command(call, request)
        except TandemError as exc:
            self._worker.fail_stream(call.key, exc)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except grpc.RpcError:
            return  # the call is over; its handler is told as well
        except Exception as exc:
            _log.error("a command failed", exc_info=exc)
            self._worker.fail_stream(call.key, InternalError(f"a command failed: {exc}"))

    async def _command(self, call: _Call, request: decode_pb2.DecodeRequest) -> None:
        kind = request.WhichOneof("event")
        if kind == "finish":
            index = request.finish.index
            await self._worker.engine.call_with_events(lambda scheduler: (None, scheduler.finish(call.key, index)))
        elif kind == "retarget":
            await self._retarget(call, request.retarget)
        else:
            raise InvalidRequestError("after Start only Retarget and Finish may come", field="event")

    async def _retarget(self, call: _Call, message: decode_pb2.DecodeRetarget) -> None:
        local = message.source == decode_pb2.PREFILL_SOURCE_LOCAL
        if not local and message.source != decode_pb2.PREFILL_SOURCE_REMOTE:
            raise InvalidRequestError("source must be REMOTE or LOCAL", field="retarget.source")
        emitted = wire.deltas_from_pb(message.emitted)
        lease = call.lease
        if lease is None or call.local or lease.retarget(message.attempt, local=local):
            call.stream.answer(Retargeted(message.attempt, committed=True))
            return
        call.local = local
        self._worker.end_transfers(lease)
        if local:
            await _quiet(lease)
        # Before the command: the engine may be through with a short request before this coroutine runs again.
        call.stream.answer(Retargeted(message.attempt, False, lease.needed_start, lease.needed_end))
        engine = self._worker.engine
        if local:
            await engine.call_with_events(lambda scheduler: (None, scheduler.start_local(call.key, emitted)))
        else:
            await engine.call(lambda scheduler: scheduler.force(call.key, emitted))


def _admitted_to_pb(call: _Call, admitted: Admission) -> decode_pb2.DecodeResponse:
    return decode_pb2.DecodeResponse(
        admitted=decode_pb2.DecodeAdmitted(
            lease_id=call.lease.lease_id if call.lease is not None else "",
            attempt=call.attempt,
            cached_tokens=admitted.cached_tokens,
            needed_start=admitted.needed_start,
            needed_end=admitted.needed_end,
        )
    )


async def first_message(requests: Requests) -> decode_pb2.DecodeStart:
    """The Start that every stream begins with. Raises InvalidRequestError, or DeadlineError for a silent client."""
    try:
        request = await asyncio.wait_for(anext(aiter(requests), None), FIRST_MESSAGE_SECONDS)
    except TimeoutError:
        raise DeadlineError(f"no Start within {FIRST_MESSAGE_SECONDS:g} seconds") from None
    if request is None or request.WhichOneof("event") != "start":
        raise InvalidRequestError("the first message must be Start", field="start")
    return request.start


async def _write(stream: OutputStream, context: Context) -> None:
    """Sends what waits, until End went out."""
    while True:
        for response in messages.decode_responses(await stream.get()):
            await context.write(response)
            if response.WhichOneof("event") == "end":
                return


async def _write_feed(feed: Feed, context: Context) -> None:
    """Sends what waits, until the feed's error."""
    while True:
        await context.write(messages.feed_to_pb(await feed.get()))


async def _quiet(lease: Lease) -> None:
    """Waits until no copy into the lease's blocks is in flight.

    Raises UnavailableError when one doesn't end: the request can go on with other blocks, here or elsewhere.
    """
    loop = asyncio.get_running_loop()
    quiet = asyncio.Event()

    def set_quiet() -> None:
        loop.call_soon_threadsafe(quiet.set)

    lease.when_quiet(set_quiet)
    try:
        await asyncio.wait_for(quiet.wait(), COPY_WAIT_SECONDS)
    except TimeoutError:
        raise UnavailableError("a copy of an earlier attempt is still running", reason="COPY_IN_FLIGHT") from None
