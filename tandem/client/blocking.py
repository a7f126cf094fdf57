"""`Client`: blocking calls. One client may be shared by threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from tandem.client import convert
from tandem.client.types import Event, GenerateResult, Message, Model, Options
from tandem.service import status
from tandem.service.channel import open_blocking_channel
from tandem.v1 import inference_pb2, inference_pb2_grpc

T = TypeVar("T")


class Client:
    """A connection to a gateway. Opened lazily, closed by `close` or `with`."""

    def __init__(self, address: str = "127.0.0.1:50051", *, timeout: float | None = None) -> None:
        """`address` is HOST:PORT or a gRPC target. `timeout` (seconds) holds for calls that name none; None: the
        server's.
        """
        self._channel = open_blocking_channel(address, retries=True)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._timeout = timeout

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> GenerateResult:
        """Generates from raw text, token ids or chat messages and returns the whole answer. Raises TandemErrors."""
        request = convert.build_request(inference_pb2.GenerateRequest, prompt, token_ids, messages, options)
        return convert.result_of(self._call(self._stub.Generate, request, timeout))

    def chat(
        self, messages: Sequence[Message], *, timeout: float | None = None, **options: Unpack[Options]
    ) -> GenerateResult:
        """`generate` from chat messages, rendered with the model's template."""
        return self.generate(messages=messages, timeout=timeout, **options)

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Events as they come; errors are raised while iterating. Use as a context manager, so that leaving cancels."""
        request = convert.build_request(inference_pb2.GenerateStreamRequest, prompt, token_ids, messages, options)
        return Stream(self._stub.GenerateStream(request, timeout=convert.deadline(timeout, self._timeout)))

    def tokenize(
        self, text: str | None = None, *, messages: Sequence[Message] | None = None, model: str = ""
    ) -> list[int]:
        """Token ids of text or of chat messages."""
        request = convert.tokenize_request(text, messages, model)
        return list(self._call(self._stub.Tokenize, request, None).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        request = convert.detokenize_request(token_ids, model, skip_special_tokens=skip_special_tokens)
        return self._call(self._stub.Detokenize, request, None).text

    def models(self) -> list[Model]:
        """The models served now."""
        response = self._call(self._stub.ListModels, inference_pb2.ListModelsRequest(), None)
        return [convert.model_of(model) for model in response.models]

    def close(self) -> None:
        """Closes the connection; running calls end."""
        self._channel.close()

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()

    def _call(self, method: Callable[..., T], request: Any, timeout: float | None) -> T:
        try:
            return method(request, timeout=convert.deadline(timeout, self._timeout))
        except grpc.RpcError as exc:
            raise status.from_rpc_error(exc) from exc


class Stream(Iterator[Event]):
    """The events of one request. Ends after `End`; `close` (or leaving the `with` block) before that cancels the
    request.
    """

    def __init__(self, call: Any) -> None:
        """`call` is the gRPC call; the client makes it."""
        self._call = call
        self._events = self._read()
        self._closed = False

    def _read(self) -> Iterator[Event]:
        try:
            for response in self._call:
                yield from convert.events_of(response)
        except grpc.RpcError as exc:
            if not self._closed:
                raise status.from_rpc_error(exc) from exc

    def __next__(self) -> Event:
        """The next event. Raises TandemErrors."""
        return next(self._events)

    def close(self) -> None:
        """Cancels the request if it still runs. May be called from another thread."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()
