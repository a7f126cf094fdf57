"""`Client`: blocking calls. One client may be shared by threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from tandem.client import convert
from tandem.client.connections import Connection
from tandem.client.going_on import Progress, Route, Tries, named, repeated
from tandem.client.types import Event, GenerateResult, Message, Model, Options
from tandem.service.channel import open_blocking_channel
from tandem.service.tls import client_files
from tandem.v1 import inference_pb2


class Client:
    """Connections to one or more gateways. Opened lazily, closed by `close` or `with`."""

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
        self._route: Route[grpc.Channel] = Route(
            address, addresses, lambda one, access: open_blocking_channel(one, tls=access), tls, api_key, tries
        )
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
        return convert.result_of(self._call("Generate", request, timeout))

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
        tries = Tries(self._route, convert.deadline(timeout, self._timeout))
        return Stream(self._route, Progress(request, tries))

    def tokenize(
        self, text: str | None = None, *, messages: Sequence[Message] | None = None, model: str = ""
    ) -> list[int]:
        """Token ids of text or of chat messages."""
        request = convert.tokenize_request(text, messages, model)
        return list(self._call("Tokenize", request, None).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "", skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        request = convert.detokenize_request(token_ids, model, skip_special_tokens=skip_special_tokens)
        text: str = self._call("Detokenize", request, None).text
        return text

    def models(self) -> list[Model]:
        """The models served now."""
        response = self._call("ListModels", inference_pb2.ListModelsRequest(), None)
        return [convert.model_of(model) for model in response.models]

    def close(self) -> None:
        """Closes the connection; running calls end."""
        self._route.close()
        _close(self._route.connections.all())

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()

    def _call(self, method: str, request: Any, timeout: float | None) -> Any:
        """A call whose answer comes at once: it begins again where a gateway is lost."""
        tries = Tries(self._route, convert.deadline(timeout, self._timeout))
        request = named(request)
        while True:
            self._route.check_open()
            at = self._route.at
            connection = self._route.connections.borrow(at)
            try:
                call = getattr(connection.stub, method)
                return call(request, timeout=tries.remaining, metadata=self._route.metadata)
            except grpc.RpcError as exc:
                pause = tries.pause_after(exc, at=at)
            finally:
                _close(self._route.connections.give_back(connection))
            closed = threading.Event()
            with self._route.pausing(closed.set):
                closed.wait(pause)
            request = repeated(request)


def _close(channels: Sequence[grpc.Channel]) -> None:
    for channel in channels:
        channel.close()


class Stream(Iterator[Event]):
    """The events of one request. Ends after `End`; `close` (or leaving the `with` block) before that cancels the
    request. Where a gateway is lost it goes on at another, or at the same once that is back.
    """

    def __init__(self, route: Route[grpc.Channel], progress: Progress) -> None:
        """Begins the call; the client makes it."""
        self._route, self._progress = route, progress
        self._borrowed: list[Connection[grpc.Channel]] = []
        """One at most; taken out by whoever comes first, the reader or `close` in another thread."""
        self._over = threading.Event()
        self._woken = threading.Event()
        """Set by `close`, and by the client's: a pause ends."""
        self._begin()
        self._events = self._read()

    def _begin(self) -> None:
        self._route.check_open()
        self._at = self._route.at
        connection, progress = self._route.connections.borrow(self._at), self._progress
        self._borrowed.append(connection)
        self._call = connection.stub.GenerateStream(
            progress.request(), timeout=progress.tries.remaining, metadata=self._route.metadata
        )

    def _end(self) -> None:
        """The call is over. Idempotent."""
        with contextlib.suppress(IndexError):
            _close(self._route.connections.give_back(self._borrowed.pop()))

    def _read(self) -> Iterator[Event]:
        try:
            yield from self._tries()
        finally:
            self._end()

    def _tries(self) -> Iterator[Event]:
        while not self._over.is_set():
            try:
                for response in self._call:
                    yield from self._progress.take(response)
                return
            except grpc.RpcError as exc:
                if self._over.is_set():
                    return
                pause = self._progress.pause_after(exc, at=self._at)
            self._end()
            with self._route.pausing(self._woken.set):
                self._woken.wait(pause)
            if not self._over.is_set():
                self._begin()
                if self._over.is_set():  # `close` in another thread may have ended the call before
                    self._call.cancel()

    def __next__(self) -> Event:
        """The next event. Raises TandemErrors."""
        return next(self._events)

    def close(self) -> None:
        """Cancels the request if it still runs. May be called from another thread."""
        self._over.set()
        self._woken.set()
        self._call.cancel()
        self._end()

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()
