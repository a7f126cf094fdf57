"""gRPC without a network: a call whose messages arrive when the explorer says so, and contexts for real servicers.

The ends speak as grpc.aio does, as far as the code under test listens: a call that ends with an error raises
AioRpcError from `read`, a cancelled one ends its handler by `task.cancel`, what a dead end sends is lost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc

from tandem.errors import UnavailableError
from tandem.service.status import to_status
from tandem.v1 import kv_transfer_pb2

if TYPE_CHECKING:
    from processes import Process

UP, DOWN = "up", "down"
_CANCEL = object()


class Wire:
    """One Transfer call between two processes. Items wait in order; `deliver` hands over the first of a direction."""

    def __init__(self, name: str, client: Process, server: Process) -> None:
        self.name, self.client, self.server = name, client, server
        self._queues: dict[str, deque[tuple[Any, int]]] = {UP: deque(), DOWN: deque()}
        self._recorder = client.recorder
        self._iterator: asyncio.Queue[Any] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self.call = ClientCall(self)

    def waiting(self, way: str) -> bool:
        """True when something waits for somebody who lives."""
        end = self.server if way == UP else self.client
        return bool(self._queues[way]) and end.alive

    def send(self, way: str, item: Any) -> None:
        """Put an item into a queue."""
        self._queues[way].append((item, self._recorder.number))

    def drop(self, way: str) -> None:
        """What is on its way is lost."""
        self._recorder.write("wire", self.name, way)
        self._queues[way].clear()

    def deliver(self, way: str) -> None:
        """The first item arrives."""
        item, origin = self._queues[way].popleft()
        self._recorder.accesses.origins.add(origin)
        self._recorder.write("wire", self.name, way)
        if way == UP:
            self.server.parts[self.name] = self.name
            self.server.react(self.name, self._to_server, item)
        else:
            self.client.react(self.client.main, self.call.arrived, item)

    def has_bytes(self) -> bool:
        """Whether the next item up is an offer that brings blocks' bytes."""
        item, _ = self._queues[UP][0]
        return item is not _CANCEL and bool(kv_transfer_pb2.TransferRequest.FromString(item).offer.payload)

    def flip(self) -> None:
        """Another byte in the blocks of the next item up."""
        item, origin = self._queues[UP].popleft()
        self._recorder.write("wire", self.name, UP)
        request = kv_transfer_pb2.TransferRequest.FromString(item)
        payload = bytearray(request.offer.payload)
        payload[0] ^= 1
        request.offer.payload = bytes(payload)
        self._queues[UP].appendleft((request.SerializeToString(), origin))

    def lose(self, dead: Process) -> None:
        """One of the processes was killed: the other hears of it, and perhaps not of the last messages."""
        if dead is self.client:
            self.drop(UP)
            self.send(UP, _CANCEL)
        else:
            self.drop(DOWN)
            self.send(DOWN, ("status", UnavailableError("the process is gone")))

    def cancel(self) -> None:
        """The client gives the call up."""
        self.drop(DOWN)
        self.drop(UP)
        self.send(UP, _CANCEL)

    def _to_server(self, item: Any) -> None:
        if item is _CANCEL:
            if self._task is not None:
                self._task.cancel()
            return
        if self._task is None:
            handler = self.server.transfers.Transfer(self._requests(), ServerContext(self._answer))
            self._task = asyncio.get_running_loop().create_task(handler)
            self._task.add_done_callback(self._handler_ended)
        self._iterator.put_nowait(item)

    async def _requests(self) -> AsyncIterator[Any]:
        while True:
            yield kv_transfer_pb2.TransferRequest.FromString(await self._iterator.get())

    def _answer(self, message: Any) -> None:
        self.send(DOWN, ("message", message))

    def _handler_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and self.client.alive:
            self.drop(UP)
            self.send(DOWN, ("status", task.exception()))


class ClientCall:
    """What `stub.Transfer()` gives to a client, on the client's loop."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._error: grpc.aio.AioRpcError | None = None
        self._over = False
        self._callbacks: list[Callable[[Any], None]] = []

    def arrived(self, item: tuple[str, Any]) -> None:
        """Something came from the server."""
        kind, value = item
        if kind == "status":
            self._over = True
            self._error = None if value is None else _rpc_error(value)
            for callback in self._callbacks:
                callback(self)
        self._inbox.put_nowait(item)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def done(self) -> bool:
        return self._over

    async def write(self, data: bytes) -> None:
        if self._over:
            raise self._error or asyncio.InvalidStateError("the call has ended")
        self._wire.send(UP, data)

    async def done_writing(self) -> None:
        """Said only after a commit, which the server takes for the end."""

    async def read(self) -> Any:
        kind, value = await self._inbox.get()
        if kind == "message":
            return value
        self._inbox.put_nowait((kind, value))
        if self._error is not None:
            raise self._error
        return grpc.aio.EOF

    def cancel(self) -> None:
        if not self._over:
            self._over = True
            self._wire.cancel()

    async def code(self) -> grpc.StatusCode:
        return self._error.code() if self._error is not None else grpc.StatusCode.OK

    async def details(self) -> str:
        return (self._error.details() or "") if self._error is not None else ""

    async def trailing_metadata(self) -> Any:
        return self._error.trailing_metadata() if self._error is not None else ()


class ServerContext:
    """What a servicer sees of its call; `answer` takes what it writes."""

    def __init__(self, answer: Callable[[Any], None]) -> None:
        self._answer = answer

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Nobody looks."""

    async def write(self, message: Any) -> None:
        self._answer(message)

    def auth_context(self) -> dict[str, Any]:
        return {}

    def time_remaining(self) -> float | None:
        return None


class WireChannels:
    """In place of `prefill_service.channels.Channels`."""

    def __init__(self, connect: Callable[[str], Wire]) -> None:
        self._connect = connect

    @asynccontextmanager
    async def borrow(self, address: str) -> AsyncIterator[Any]:
        yield _Channel(lambda: self._connect(address))


class _Channel:
    def __init__(self, connect: Callable[[], Wire]) -> None:
        self._connect = connect

    def stream_stream(self, method: str, **_: Any) -> Callable[..., ClientCall]:
        return lambda timeout=None: self._connect().call


def _rpc_error(error: BaseException) -> grpc.aio.AioRpcError:
    status = to_status(error)
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(
        status.code, nothing, grpc.aio.Metadata(*(status.trailing_metadata or ())), status.details
    )
