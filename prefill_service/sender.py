"""One request's transfer to its decode worker: drives `kv_transfer.SendSession` over KvTransferService.Transfer.

Life cycle: Transfer(...) -> `run()` as a task, which opens the stream -> `reserve`, then `ready` as chunks are computed
-> `finish(record)` with the first tokens -> `run` returns when the decode worker has committed, or raises. Cancel the
task to give up. All of it on the event loop; reading blocks, checksums and serialization happen in `executor`.

The decode worker says which tokens it lacks: only these are offered. Offers wait while too many are unacknowledged.
It also beats: a way that is silent for three seconds is lost, long before keepalive finds out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from kv_transfer.messages import Ack, Committed, Opened
from kv_transfer.session import SendSession
from prefill_service.blame import TARGET_PROTOCOL, lost, target_error
from prefill_service.channels import Channels
from tandem.errors import InternalError, InvalidRequestError
from tandem.record import Record
from tandem.service.call_status import CallStatus
from tandem.service.silence import Silence
from tandem.v1 import kv_transfer_pb2
from worker import transfer_messages as messages
from worker.transfer_wire import offer_to_wire

METHOD = "/tandem.v1.KvTransferService/Transfer"
_T = TypeVar("_T")
SILENCE_SECONDS = 3.0
"""Three missed heartbeats of the decode worker: the way to it is lost, whatever its socket says."""


@dataclass(frozen=True, slots=True)
class TransferResult:
    """How a transfer ended well."""

    committed: bool
    """False: another attempt had committed before."""
    bytes_sent: int
    """Bytes of the blocks that were offered, whichever way they went."""
    seconds: float
    """From the first offer to the commit."""


class Transfer:
    """One lease and attempt."""

    def __init__(
        self, session: SendSession, channels: Channels, address: str, executor: Executor, *, most_tokens: int
    ) -> None:
        """`address` of the decode worker, HOST:PORT. `most_tokens`: how many tokens the request has to offer."""
        self._session = session
        self._channels = channels
        self._executor = executor
        self._most_tokens = most_tokens
        self.address = address
        self._blocks: Sequence[int] = ()
        self._ready_end = 0
        self._taken_end = 0
        self._record: Record | None = None
        self._news = asyncio.Event()
        self._opening = asyncio.Event()
        """Set when Open is ready to be written: before that nobody can be expected to beat."""
        self._first_offer = 0.0

    def reserve(self, blocks: Sequence[int]) -> None:
        """The request's blocks, from token 0 on; they stay the same. Before the first `ready`."""
        self._blocks = blocks

    def ready(self, token_end: int) -> None:
        """The KV of tokens [0, token_end) is in the blocks."""
        self._ready_end = token_end
        self._news.set()

    def finish(self, record: Record) -> None:
        """All is computed; `record` has the first tokens and goes with the commit."""
        self._record = record
        self._news.set()

    async def run(self, time_left: float | None) -> TransferResult:
        """Open, offer, commit; `time_left` in seconds. Raises TandemErrors that say whose fault it is (`blame`)."""
        async with self._channels.borrow(self.address) as channel:
            # Raw bytes: requests are serialized in worker threads.
            method: Any = channel.stream_stream(
                METHOD, response_deserializer=kv_transfer_pb2.TransferResponse.FromString
            )
            committed = await self._converse(method(timeout=time_left))
        seconds = time.perf_counter() - self._first_offer if self._first_offer else 0.0
        return TransferResult(committed, self._session.bytes_offered, seconds)

    async def _converse(self, call: Any) -> bool:
        """Reads and writes at once. The reader knows how the stream ended; the writer only that it did."""
        status = CallStatus(call)
        reader = asyncio.create_task(self._read(call))
        writer = asyncio.create_task(self._write(call))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done() and not reader.done() and not call.done():
                await writer  # its own error, if any; that the stream is over the reader says better
            return await reader
        except grpc.aio.AioRpcError as exc:
            raise target_error(await status.error(exc), self.address) from exc
        finally:
            call.cancel()
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, call: Any) -> bool:
        await self._opening.wait()
        try:
            async with Silence(SILENCE_SECONDS) as silence:
                return await self._answers(call, silence)
        except TimeoutError:
            problem = lost(self.address, f"no heartbeat for {SILENCE_SECONDS:g} s")
            raise target_error(problem, self.address) from None

    async def _answers(self, call: Any, silence: Silence) -> bool:
        while True:
            message = await call.read()
            silence.heard()
            if message is grpc.aio.EOF:
                raise target_error(lost(self.address, "the transfer ended without a commit"), self.address)
            if message.WhichOneof("event") == "heartbeat":
                continue
            try:
                committed = self._take(messages.answer_from_pb(message))
            except (InvalidRequestError, InternalError) as exc:
                raise target_error(InternalError(exc.message, reason=TARGET_PROTOCOL), self.address) from exc
            if committed is not None:
                return committed
            self._news.set()

    def _take(self, answer: Opened | Ack | Committed) -> bool | None:
        if isinstance(answer, Committed):
            return self._session.on_committed(answer)
        if isinstance(answer, Ack):
            self._session.on_ack(answer)
        elif answer.needed_end > self._most_tokens:
            raise InternalError(f"tokens to {answer.needed_end} are wanted, the request has {self._most_tokens}")
        else:
            self._session.on_opened(answer)
        return None

    async def _write(self, call: Any) -> None:
        opening = await self._in_thread(self._open)
        self._opening.set()
        await call.write(opening)
        coming = self._produce()
        try:
            while True:
                offer = await coming
                if offer is not None:
                    self._first_offer = self._first_offer or time.perf_counter()
                    coming = self._produce()  # while this one is written
                    await call.write(offer)
                elif (record := self._record) is not None and self._session.all_offered:
                    await call.write(await self._in_thread(lambda: self._commit(record)))
                    await call.done_writing()
                    return
                else:
                    await self._news.wait()
                    coming = self._produce()
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    def _produce(self) -> asyncio.Future[bytes | None]:
        """The next offer, or None if there is none yet; what is news after this call leads to another one."""
        self._news.clear()
        return asyncio.ensure_future(self._in_thread(self._next_offer))

    def _open(self) -> bytes:
        """Serialized in a worker thread, like what follows: it must not cost the event loop's time."""
        return messages.open_to_pb(self._session.open()).SerializeToString()

    def _next_offer(self) -> bytes | None:
        """In a worker thread, one at a time."""
        end = self._ready_end
        if end > self._taken_end:
            self._session.ready(end, self._blocks)
            self._taken_end = end
        offer = self._session.next_offer()
        return None if offer is None else offer_to_wire(offer)

    def _commit(self, record: Record) -> bytes:
        return messages.commit_to_pb(self._session.commit(record)).SerializeToString()

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)
