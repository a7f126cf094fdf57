"""`AsyncClient`: the same calls for asyncio. Make it inside a running event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from tandem.client import convert
from tandem.client.connections import Connection
from tandem.client.going_on import Progress, Route, Tries, named, repeated
from tandem.client.types import Event, GenerateResult, Message, Model, Options
from tandem.service.channel import open_channel
from tandem.service.tls import client_files
from tandem.v1 import inference_pb2


class AsyncClient:
    """Connections to one or more gateways. Opened lazily, closed by `close` or `async with`."""

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        addresses: Sequence[str] | None = None,
        timeout: float | None = None,
        tries: int | None = None,
        api_key: str | None = None,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
        tls_server_name: str = "",
    ) -> None:
        """`address` is HOST:PORT or a gRPC target. `addresses`, in its place, are several gateways of the same workers;
        when one is lost, the next is asked. `timeout` (seconds) holds for calls that name none; None: the server's.
        `tries` in a row may bring nothing before a call fails: a few by default, and for most of a minute once a stream
        has begun.

        `tls_ca` (PEM file) means TLS, with the client's own certificate where `tls_cert` and `tls_key` are given; files
        that change are for new calls. `tls_server_name`: what the gateway's certificate must name in place of the
        address. Raises ConfigError.
        """
        tls = client_files(tls_ca, tls_cert, tls_key, tls_server_name)
        self._route: Route[grpc.aio.Channel] = Route(
            address, addresses, lambda one, access: open_channel(one, tls=access), tls, api_key, tries
        )
        self._timeout = timeout

    async def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  # becomes the RPC's deadline, which the server knows
        **options: Unpack[Options],
    ) -> GenerateResult:
        """Generates from raw text, token ids or chat messages and returns the whole answer. Raises TandemErrors."""
        request = convert.build_request(inference_pb2.GenerateRequest, prompt, token_ids, messages, options)
        return convert.result_of(await self._call("Generate", request, timeout))

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        timeout: float | None = None,  # noqa: ASYNC109  # as above
        **options: Unpack[Options],
    ) -> GenerateResult:
        """`generate` from chat messages, rendered with the model's template."""
        return await self.generate(messages=messages, timeout=timeout, **options)

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncStream:
        """Events as they come; errors are raised while iterating. Use with `async with`, so that leaving cancels."""
        request = convert.build_request(inference_pb2.GenerateStreamRequest, prompt, token_ids, messages, options)
        tries = Tries(self._route, convert.deadline(timeout, self._timeout))
        return AsyncStream(self._route, Progress(request, tries))

    async def tokenize(
        self, text: str | None = None, *, messages: Sequence[Message] | None = None, model: str = ""
    ) -> list[int]:
        """Token ids of text or of chat messages."""
        response = await self._call("Tokenize", convert.tokenize_request(text, messages, model), None)
        return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        request = convert.detokenize_request(token_ids, model, skip_special_tokens=skip_special_tokens)
        response: inference_pb2.DetokenizeResponse = await self._call("Detokenize", request, None)
        return response.text

    async def models(self) -> list[Model]:
        """The models served now."""
        response = await self._call("ListModels", inference_pb2.ListModelsRequest(), None)
        return [convert.model_of(model) for model in response.models]

    async def close(self) -> None:
        """Closes the connection; running calls end."""
        self._route.close()
        await _close(self._route.connections.all())

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        await self.close()

    async def _call(self, method: str, request: Any, seconds: float | None) -> Any:
        """A call whose answer comes at once: it begins again where a gateway is lost."""
        tries = Tries(self._route, convert.deadline(seconds, self._timeout))
        request = named(request)
        while True:
            self._route.check_open()
            at = self._route.at
            connection = self._route.connections.borrow(at)
            try:
                call = getattr(connection.stub, method)
                return await call(request, timeout=tries.remaining, metadata=self._route.metadata)
            except grpc.RpcError as exc:
                pause = tries.pause_after(exc, at=at)
            finally:
                await _close(self._route.connections.give_back(connection))
            await _pause(self._route, asyncio.Event(), pause)
            request = repeated(request)


async def _close(channels: Sequence[grpc.aio.Channel]) -> None:
    await asyncio.gather(*(channel.close() for channel in channels))


async def _pause(route: Route[Any], woken: asyncio.Event, seconds: float) -> None:
    """Until the client is closed, or `woken` is set, or the time is over."""
    with route.pausing(woken.set), contextlib.suppress(TimeoutError):
        await asyncio.wait_for(woken.wait(), seconds)


class AsyncStream(AsyncIterator[Event]):
    """The events of one request. Ends after `End`; `close` (or leaving `async with`) before that cancels the
    request. Where a gateway is lost it goes on at another, or at the same once that is back.
    """

    def __init__(self, route: Route[grpc.aio.Channel], progress: Progress) -> None:
        """Begins the call; the client makes it."""
        self._route, self._progress = route, progress
        self._connection: Connection[grpc.aio.Channel] | None = None
        self._over = asyncio.Event()
        self._woken = asyncio.Event()
        """Set by `close`, and by the client's: a pause ends."""
        self._begin()
        self._events = self._read()

    def _begin(self) -> None:
        self._route.check_open()
        self._at = self._route.at
        self._connection, progress = self._route.connections.borrow(self._at), self._progress
        self._call = self._connection.stub.GenerateStream(
            progress.request(), timeout=progress.tries.remaining, metadata=self._route.metadata
        )

    async def _end(self) -> None:
        """The call is over. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await _close(self._route.connections.give_back(connection))

    async def _read(self) -> AsyncIterator[Event]:
        try:
            while not self._over.is_set():
                try:
                    async for response in self._call:
                        for event in self._progress.take(response):
                            yield event
                    return
                except grpc.RpcError as exc:
                    pause = self._progress.pause_after(exc, at=self._at)
                except asyncio.CancelledError:
                    # gRPC says the same of a call that `close` ended and of a reader whose task is cancelled.
                    task = asyncio.current_task()
                    if not self._over.is_set() or (task is not None and task.cancelling()):
                        raise
                    return
                await self._end()
                await _pause(self._route, self._woken, pause)
                if not self._over.is_set():
                    self._begin()
        finally:
            await self._end()

    async def __anext__(self) -> Event:
        """The next event. Raises TandemErrors."""
        return await anext(self._events)

    async def close(self) -> None:
        """Cancels the request if it still runs. A task that reads the stream comes to its end."""
        self._over.set()
        self._woken.set()
        self._call.cancel()
        await self._end()

    async def __aenter__(self) -> Self:
        """The stream itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        await self.close()
