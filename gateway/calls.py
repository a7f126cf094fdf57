"""One RPC to a worker as a source of events.

Life cycle of a `Call`: made -> `start()` opens the RPC and a task that reads it -> every response goes to the inbox as
(call, response), the end as (call, Ended) exactly once -> `close()` at any time ends the RPC at once, and nothing more
comes. The end of a decode worker's feed comes as (call, Ended) too, with FeedLostError. A stream that is silent for
three heartbeats has failed, whatever its socket says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from gateway.ended import Ended, ended_by
from gateway.feed import TokenFeed
from gateway.workers import Worker
from tandem.errors import InternalError, UnavailableError
from tandem.record import Record, TokenDelta
from tandem.service import wire
from tandem.service.call_status import CallStatus
from tandem.service.logging import get_logger
from tandem.service.silence import Silence
from tandem.v1 import decode_pb2, prefill_pb2

_log = get_logger(__name__)

BEATS = ("heartbeat", "progress")
"""Come as long as the engine lives, from before the request is aboard."""
Inbox = asyncio.Queue[tuple["Call", Any]]


class Call:
    """Reads one RPC. `heard` is True once the worker answered anything but a beat: the request was aboard."""

    def __init__(self, worker: Worker, inbox: Inbox, *, deadline: float, silence: float) -> None:
        """`deadline` is of the loop's clock, `silence` in seconds."""
        self.worker = worker
        self.heard = False
        self._inbox, self._deadline, self._silence = inbox, deadline, silence
        self._rpc: Any = None
        self._status: CallStatus | None = None
        self._task: asyncio.Task[None] | None = None

    def _begin(self, rpc: Any) -> None:
        self._rpc = rpc
        self._status = CallStatus(rpc)
        self._task = asyncio.create_task(self._read())

    @property
    def _timeout(self) -> float:
        return max(0.001, self._deadline - asyncio.get_running_loop().time())

    async def _read(self) -> None:
        ended = Ended()
        try:
            async with Silence(self._silence) as silence:
                async for response in self._rpc:
                    silence.heard()
                    self.heard = self.heard or response.WhichOneof("event") not in BEATS
                    self._inbox.put_nowait((self, response))
        except TimeoutError:
            ended = Ended(UnavailableError(f"no heartbeat for {self._silence:g} s", reason="NO_HEARTBEAT"), died=True)
        except grpc.aio.AioRpcError as exc:
            assert self._status is not None
            ended = ended_by(await self._status.error(exc))
        except Exception as exc:  # whatever it was: a call without its end would hold the request until its deadline
            _log.error("a worker's stream can't be read", address=self.worker.address, exc_info=exc)
            ended = Ended(InternalError(f"a worker's stream can't be read: {exc}"))
        self._rpc.cancel()
        self._inbox.put_nowait((self, ended))

    async def _write(self, message: Any) -> None:
        """A stream that is over says so through its reader, whatever a write still waits for."""
        assert self._task is not None
        write = asyncio.ensure_future(self._rpc.write(message))
        try:
            await asyncio.wait({write, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            write.cancel()
            await asyncio.gather(write, return_exceptions=True)

    def close(self) -> None:
        """Ends the RPC now; its end frees everything that the worker holds."""
        if self._rpc is not None:
            self._rpc.cancel()
        if self._task is not None:
            self._task.cancel()


class DecodeCall(Call):
    """DecodeService.Decode, and the request's share of the worker's token feed when there is one."""

    def __init__(
        self, worker: Worker, inbox: Inbox, on_tokens: Callable[[Any], None], *, deadline: float, silence: float
    ) -> None:
        """See `Call`. `on_tokens` gets the deltas (protobuf) that come on the feed, without a way through the inbox."""
        super().__init__(worker, inbox, deadline=deadline, silence=silence)
        self._on_tokens = on_tokens
        self._feed: TokenFeed | None = None
        self._number = 0

    @property
    def fed(self) -> bool:
        """Tokens come on the feed: the stream may end before the last of them are here."""
        return self._feed is not None

    async def start(self, record: Record, source: decode_pb2.PrefillSource.ValueType) -> None:
        """Opens the stream; attempt 1."""
        self._feed = self.worker.feed if self.worker.feed is not None and self.worker.feed.ready else None
        self._number = self._feed.join(self._on_feed) if self._feed is not None else 0
        self._begin(self.worker.stub.Decode(timeout=self._timeout))
        start = decode_pb2.DecodeStart(
            record=wire.record_to_pb(record),
            attempt=1,
            source=source,
            incarnation=self.worker.info.incarnation,
            feed_id=self._feed.feed_id if self._feed is not None else "",
            feed_number=self._number,
        )
        await self._write(decode_pb2.DecodeRequest(start=start))

    def _on_feed(self, message: Any) -> None:
        if isinstance(message, Ended):
            self._inbox.put_nowait((self, message))
        else:
            self.heard = True
            self._on_tokens(message)

    def close(self) -> None:
        """Leaves the feed too."""
        if self._feed is not None:
            self._feed.leave(self._number)
        super().close()

    async def retarget(
        self, attempt: int, source: decode_pb2.PrefillSource.ValueType, emitted: Sequence[TokenDelta]
    ) -> None:
        """The prefill worker was lost: expect another attempt."""
        message = decode_pb2.DecodeRetarget(
            attempt=attempt, source=source, emitted=[wire.delta_to_pb(delta) for delta in emitted]
        )
        await self._write(decode_pb2.DecodeRequest(retarget=message))

    async def finish(self, index: int) -> None:
        """One output needs no more tokens."""
        await self._write(decode_pb2.DecodeRequest(finish=decode_pb2.DecodeFinish(index=index)))


@dataclass(frozen=True)
class Lease:
    """What a decode worker granted."""

    lease_id: str
    attempt: int
    needed_start: int
    needed_end: int


class PrefillCall(Call):
    """PrefillService.Prefill."""

    def start(self, record: Record, decode: Worker, lease: Lease) -> None:
        """Opens the stream: the prompt's blocks go to `decode`."""
        target = prefill_pb2.TransferTarget(
            lease_id=lease.lease_id,
            attempt=lease.attempt,
            address=decode.address,
            incarnation=decode.info.incarnation,
            needed_start=lease.needed_start,
            needed_end=lease.needed_end,
            layout=decode.info.layout,
            transports=decode.info.transports,
            convert_kv_dtype=decode.info.convert_kv_dtype,
            host_id=decode.info.host_id,
        )
        request = prefill_pb2.PrefillRequest(
            record=wire.record_to_pb(record), incarnation=self.worker.info.incarnation, target=target
        )
        self._begin(self.worker.stub.Prefill(request, timeout=self._timeout))
