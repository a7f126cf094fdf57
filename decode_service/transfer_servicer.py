"""KvTransferService: a prefill worker's blocks come in, copied by this process into its own pool.

Life of a `Transfer` call: Open (the attempt is taken) -> Offers, each copied by a few threads and acknowledged,
several at a time -> Commit: all copies over, generations checked, compare-and-set on the lease, the sequence handed to
the engine thread -> Committed. The call dies alone: the lease lives on for another attempt. It ends when the lease or
the attempt does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from decode_service.transfer_threads import Threads
from decode_service.worker import HEARTBEAT_SECONDS, DecodeWorker
from kv_transfer.messages import Ack, Commit, Committed, Offer, Open, Opened
from kv_transfer.peers import Identity
from kv_transfer.session import CopyPlan, Receiver, ReceiveSession
from kv_transfer.staging import StagingPool
from kv_transfer.transport import TargetTransport
from tandem.errors import DeadlineError, InternalError, InvalidRequestError, TandemError
from tandem.service.logging import get_logger
from tandem.service.peers import peer_of
from tandem.v1 import kv_transfer_pb2, kv_transfer_pb2_grpc
from worker import transfer_messages as messages
from worker import transfer_wire

_log = get_logger(__name__)
Requests = AsyncIterator[kv_transfer_pb2.TransferRequest | Offer]
Context = grpc.aio.ServicerContext[Any, Any]
SERVICE = "tandem.v1.KvTransferService"
FIRST_MESSAGE_SECONDS = 10.0


class TransferServicer(kv_transfer_pb2_grpc.KvTransferServiceServicer):
    """Raises TandemErrors; the server's interceptor maps them. `close` when the server has stopped."""

    def __init__(self, worker: DecodeWorker, transports: dict[str, TargetTransport]) -> None:
        """`transports` by name, best first; they become the servicer's."""
        identity = worker.identity
        self._worker = worker
        self._transports = transports
        self._threads = Threads()
        self._receiver = Receiver(
            leases=worker.leases,
            pool=worker.pool_memory,
            layout=identity.layout,
            model_id=identity.model_id,
            numerics_id=identity.numerics_id,
            transports=transports,
            convert_dtype=identity.convert_kv_dtype,
            other_pools=worker.other_pools,
            staging=StagingPool(),
        )

    def close(self) -> None:
        """No more copies; forgets every sender."""
        self._threads.close()
        for transport in self._transports.values():
            transport.close()

    async def Transfer(  # type: ignore[override]  # noqa: N802
        self, request_iterator: Requests, context: Context
    ) -> None:
        """See proto/tandem/v1/kv_transfer.proto."""
        if self._worker.stopping:
            raise self._worker.stopped_error()
        transfer = _Transfer(self._worker, self._receiver, self._threads, context)
        metrics = self._worker.metrics
        try:
            await transfer.run(aiter(request_iterator))
        except Exception:
            if metrics is not None and not transfer.counted:
                metrics.transfer_failed()
            raise
        finally:
            transfer.close()


def add_to_server(servicer: TransferServicer, server: grpc.aio.Server) -> None:
    """As the generated code would, with a deserializer that leaves the blocks' bytes where they are."""
    handlers = {
        "Transfer": grpc.stream_stream_rpc_method_handler(
            servicer.Transfer,
            request_deserializer=transfer_wire.Requests.FromString,
            response_serializer=kv_transfer_pb2.TransferResponse.SerializeToString,
        )
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class _Transfer:
    """One call's state."""

    def __init__(self, worker: DecodeWorker, receiver: Receiver, threads: Threads, context: Context) -> None:
        self._worker = worker
        self._threads = threads
        self._context = context
        peer = peer_of(context)
        identity = Identity(peer.dns_names.union(peer.uris), peer.fingerprint)
        self._session = ReceiveSession(receiver, identity=identity)
        self._block_bytes = receiver.layout.block_bytes
        self._copies: set[asyncio.Task[None]] = set()
        self._write_lock = asyncio.Lock()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._committed = False
        self._beats: asyncio.Task[None] | None = None
        self._bytes_copied = 0
        self._started = time.perf_counter()
        self.counted = False
        """It is among the transfers that were committed."""

    async def run(self, requests: Requests) -> None:
        """From Open to Committed."""
        try:
            await self._receive(requests)
        finally:
            if self._beats is not None:
                self._beats.cancel()
                await asyncio.gather(self._beats, return_exceptions=True)

    async def _beat(self) -> None:
        with contextlib.suppress(grpc.RpcError):  # the call is over; whoever runs it is told as well
            while True:
                await asyncio.sleep(HEARTBEAT_SECONDS)
                if self._worker.engine.alive:
                    async with self._write_lock:
                        await self._context.write(messages.heartbeat_to_pb())

    async def _receive(self, requests: Requests) -> None:
        attempt = await self._open(requests)
        with self._worker.transferring(self._session.lease, attempt) as over:
            reader = asyncio.create_task(self._read(requests))
            try:
                await asyncio.wait({reader, over, self._failed}, return_when=asyncio.FIRST_COMPLETED)
                if self._committed:
                    # A short request may be over, and its lease with it, before the sender has its answer.
                    await reader
                for ended in (self._failed, reader, over):
                    if ended.done():
                        ended.result()
                        return
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    def close(self) -> None:
        """The call is over: copies in flight stop at their next block, and the lease waits for them."""
        self._session.close()
        for task in self._copies:
            task.cancel()
        self._failed.cancel()

    async def _open(self, requests: Requests) -> int:
        """Takes the attempt, and gives its number."""
        try:
            request = await asyncio.wait_for(anext(requests, None), FIRST_MESSAGE_SECONDS)
        except TimeoutError:
            raise DeadlineError(f"no Open within {FIRST_MESSAGE_SECONDS:g} seconds") from None
        if request is None or isinstance(request, Offer) or request.WhichOneof("event") != "open":
            raise InvalidRequestError("the first message of a transfer must be Open", field="open")
        opening = messages.open_from_pb(request.open)
        if request.open.heartbeats:
            # Apart from the first message: a write given up before it sent the headers would take the status with it.
            await self._context.send_initial_metadata(())
            self._beats = asyncio.create_task(self._beat())
        await self._answer(await self._threads.talk(lambda: self._on_open(opening)))
        return opening.attempt

    def _on_open(self, opening: Open) -> Opened:
        opened = self._session.on_open(opening)
        self._session.wait_for_older()
        return opened

    async def _read(self, requests: Requests) -> None:
        async for request in requests:
            if isinstance(request, Offer):
                self._start_copy(self._session.on_offer(request))
                continue
            kind = request.WhichOneof("event")
            if kind == "offer":
                self._start_copy(self._session.on_offer(messages.offer_from_pb(request.offer)))
            elif kind == "commit":
                await self._commit(messages.commit_from_pb(request.commit))
                return
            else:
                raise InvalidRequestError("after Open only Offer and Commit may come", field="event")
        raise InvalidRequestError("the transfer ended without a commit", field="commit")

    def _start_copy(self, plan: CopyPlan) -> None:
        task = asyncio.create_task(self._copy(plan))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _copy(self, plan: CopyPlan) -> None:
        try:
            ack = await self._threads.copy(lambda: self._session.copy(plan), self._session.turn)
            self._bytes_copied += len(plan.target_blocks) * self._block_bytes
            await self._answer(ack)
        except (TandemError, grpc.RpcError) as exc:
            self._fail(exc)
        except Exception as exc:
            _log.error("a copy failed", exc_info=exc)
            self._fail(InternalError(f"a copy failed: {exc}"))

    def _fail(self, error: Exception) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # retrieved: the call may have ended another way

    async def _commit(self, commit: Commit) -> None:
        """Copies first. Once the lease says committed, the engine must take the sequence, or the request fails."""
        await asyncio.gather(*self._copies)
        if self._failed.done():
            self._failed.result()
        # Shielded: between the lease's commit and the engine's, the end of this call must not lose the sequence.
        taking = asyncio.create_task(self._take(commit))
        await self._answer(await asyncio.shield(taking))

    async def _take(self, commit: Commit) -> Committed:
        key = self._worker.key_of(self._session.lease)
        committed = await self._threads.talk(lambda: self._session.on_commit(commit))
        if committed.already_committed:
            self._count()
            return committed
        try:
            await self._worker.engine.commit(key, commit.record, commit.token_end, self._session.lease.blocks)
        except Exception as exc:
            self._worker.fail_stream(key, exc if isinstance(exc, TandemError) else InternalError(f"commit: {exc}"))
            raise
        self._committed = True
        self._count()
        return committed

    def _count(self) -> None:
        """At the commit, not at the call's end: a short request may be over, and the call cancelled, before that."""
        self.counted = True
        if self._worker.metrics is not None:
            self._worker.metrics.transferred(self._bytes_copied, time.perf_counter() - self._started)

    async def _answer(self, answer: Opened | Ack | Committed) -> None:
        async with self._write_lock:
            await self._context.write(messages.answer_to_pb(answer))
