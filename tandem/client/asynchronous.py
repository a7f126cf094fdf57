"""`AsyncClient`: the same calls for asyncio. Make it inside a running event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from tandem.client import convert
from tandem.client.types import Event, GenerateResult, Message, Model, Options
from tandem.service import status
from tandem.service.channel import open_channel
from tandem.v1 import inference_pb2, inference_pb2_grpc

T = TypeVar("T")


class AsyncClient:
    """A connection to a gateway. Opened lazily, closed by `close` or `async with`."""

    def __init__(self, address: str = "127.0.0.1:50051", *, timeout: float | None = None) -> None:
        """`address` is HOST:PORT or a gRPC target. `timeout` (seconds) holds for calls that name none; None: the
        server's.
        """
        self._channel = open_channel(address, retries=True)
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)
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
        return convert.result_of(await self._call(self._stub.Generate, request, timeout))

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
        return AsyncStream(self._stub.GenerateStream(request, timeout=convert.deadline(timeout, self._timeout)))

    async def tokenize(
        self, text: str | None = None, *, messages: Sequence[Message] | None = None, model: str = ""
    ) -> list[int]:
        """Token ids of text or of chat messages."""
        response = await self._call(self._stub.Tokenize, convert.tokenize_request(text, messages, model), None)
        return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        request = convert.detokenize_request(token_ids, model, skip_special_tokens=skip_special_tokens)
        response: inference_pb2.DetokenizeResponse = await self._call(self._stub.Detokenize, request, None)
        return response.text

    async def models(self) -> list[Model]:
        """The models served now."""
        response = await self._call(self._stub.ListModels, inference_pb2.ListModelsRequest(), None)
        return [convert.model_of(model) for model in response.models]

    async def close(self) -> None:
        """Closes the connection; running calls end."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        await self.close()

    async def _call(self, method: Callable[..., Awaitable[T]], request: Any, seconds: float | None) -> T:
        try:
            return await method(request, timeout=convert.deadline(seconds, self._timeout))
        except grpc.RpcError as exc:
            raise status.from_rpc_error(exc) from exc


class AsyncStream(AsyncIterator[Event]):
    """The events of one request. Ends after `End`; `close` (or leaving `async with`) before that cancels the
    request.
    """

    def __init__(self, call: Any) -> None:
        """`call` is the gRPC call; the client makes it."""
        self._call = call
        self._events = self._read()
        self._closed = False

    async def _read(self) -> AsyncIterator[Event]:
        try:
            async for response in self._call:
                for event in convert.events_of(response):
                    yield event
        except grpc.RpcError as exc:
            raise status.from_rpc_error(exc) from exc
        except asyncio.CancelledError:
            # gRPC says the same of a call that `close` ended and of a reader whose task is cancelled.
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise

    async def __anext__(self) -> Event:
        """The next event. Raises TandemErrors."""
        return await anext(self._events)

    async def close(self) -> None:
        """Cancels the request if it still runs. A task that reads the stream comes to its end."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        """The stream itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        await self.close()
