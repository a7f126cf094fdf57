"""How a client goes on when a gateway is lost: where to ask next, for what, and when to give up. Torch-free, loop-free.

Life cycle: one `Route` per client, over all its gateways; one `Tries` per call, which says how long to pause before the
next try or raises what ends the call; one `Progress` per stream, which notes what has come and builds the request for
the rest of it.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic

import grpc

from tandem.client import convert
from tandem.client.connections import Channel, Connections, Open
from tandem.client.types import Event
from tandem.errors import (
    ConfigError,
    DeadlineError,
    DrainingError,
    IncompatibleError,
    OverloadedError,
    RequestCancelledError,
    TandemError,
    UnavailableError,
)
from tandem.service import status
from tandem.service.tls import ClientTls
from tandem.v1 import inference_pb2 as pb

TRIES = 4
"""Of a call that nothing has come of yet: nobody may be there at all. Two for each gateway, if that is more."""
RESUMES = 30
"""Tries in a row that bring nothing new, once a stream has begun: most of a minute, enough to start a gateway again."""
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 2.0
_CUT = (
    *(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED),
    *(grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL),
)
"""What gRPC itself says of a connection that broke."""


class Route(Generic[Channel]):
    """The gateways, and which of them is asked now. All calls move on together; threads may share it."""

    def __init__(
        self,
        address: str,
        addresses: Sequence[str] | None,
        open_channel: Open[Channel],
        tls: ClientTls | None = None,
        api_key: str | None = None,
        tries: int | None = None,
    ) -> None:
        """Asks `address`, or the first of `addresses` until it fails. Raises ConfigError for an empty list, fewer than
        one of `tries`, and what can be no API key.
        """
        given = [address] if addresses is None else list(addresses)
        if not given:
            raise ConfigError("addresses: at least one gateway is needed")
        if tries is not None and tries < 1:
            raise ConfigError(f"tries: must be 1 or more, got {tries}")
        self.tries = tries or max(TRIES, 2 * len(given))
        self.resumes = tries or max(RESUMES, 2 * len(given))
        self.addresses = given
        self.metadata = key_metadata(api_key)
        """Goes with every call."""
        self.connections = Connections(given, open_channel, tls)
        self._at = 0
        self.closed = False
        self._pausing: list[Callable[[], None]] = []

    def close(self) -> None:
        """No more calls; who pauses before another try is woken. The channels are the caller's to close."""
        self.closed = True
        for wake in list(self._pausing):
            wake()

    @contextmanager
    def pausing(self, wake: Callable[[], None]) -> Iterator[None]:
        """Around a pause: `close` calls `wake`, perhaps from another thread."""
        self._pausing.append(wake)
        try:
            if self.closed:
                wake()
            yield
        finally:
            self._pausing.remove(wake)

    @property
    def at(self) -> int:
        """Index of the gateway to ask."""
        return self._at

    def check_open(self) -> None:
        """Before each call: gRPC's own complaints of a closed channel are of no use to anybody. Raises
        RequestCancelledError.
        """
        if self.closed:
            raise RequestCancelledError("the client is closed")

    def leave(self, at: int) -> None:
        """The gateway `at` failed: ask the next, unless another call has moved on already."""
        if self._at == at:
            self._at = (at + 1) % len(self.addresses)


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The header that says who calls. Raises ConfigError, which doesn't quote the key."""
    if api_key is None:
        return ()
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise ConfigError("api_key: a key is printable ASCII without spaces")
    return (("authorization", f"Bearer {api_key}"),)


class Tries:
    """One call's misfortunes so far."""

    def __init__(self, route: Route[Any], timeout: float | None) -> None:
        """`timeout` in seconds for all tries together; None: the server's."""
        self._route = route
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._failures = 0
        self._most = route.tries
        self._begun = False

    @property
    def remaining(self) -> float | None:
        """Seconds left, for gRPC."""
        return None if self._deadline is None else max(0.001, self._deadline - time.monotonic())

    def begun(self) -> None:
        """A stream has begun: somebody is there, and it is worth more patience."""
        self._begun, self._most = True, self._route.resumes

    def succeeded(self) -> None:
        """Something new came."""
        self._failures = 0

    def pause_after(self, exc: grpc.RpcError, *, at: int, final: bool = False) -> float:
        """Seconds to wait before the next try, at another gateway if there is one. Raises what ends the call."""
        error = status.from_rpc_error(exc)
        self._failures += 1
        over = final or self._route.closed or self._failures >= self._most
        if over or not may_go_on(exc, error, begun=self._begun):
            raise error from exc
        self._route.leave(at)
        rounds = (self._failures - 1) // len(self._route.addresses)
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**rounds) * random.uniform(0.5, 1.0)
        pause = max(pause, self._asked_pause(error))
        left = self.remaining
        if left is not None and left <= pause:
            raise DeadlineError(f"the deadline is too near for another try; the last one: {error.message}") from exc
        return pause

    def _asked_pause(self, error: TandemError) -> float:
        """Seconds that the gateway asks for. One that drains speaks for itself alone: the next is asked soon."""
        if isinstance(error, DrainingError) and len(self._route.addresses) > 1:
            return 0.0
        return getattr(error, "retry_after", None) or 0.0


def may_go_on(exc: grpc.RpcError, error: TandemError, *, begun: bool = False) -> bool:
    """True when another try may help: the gateway is gone, or it says UNAVAILABLE. A stream that has `begun` waits for
    its place in a full queue too, if the gateway says when: what the caller has of it would be lost.
    """
    call: Any = exc
    if not status.answered(call):
        return call.code() in _CUT
    if isinstance(error, OverloadedError):
        return begun and error.retry_after is not None
    return isinstance(error, UnavailableError)


def named(request: Any) -> Any:
    """`request` with an id if it can have one, so that every gateway knows its repetition for the same."""
    if isinstance(request, (pb.GenerateRequest, pb.GenerateStreamRequest)):
        request.request_id = request.request_id or uuid.uuid4().hex
    return request


def repeated(request: Any) -> Any:
    """`request`, now in place of the same one that may still live at a gateway whose connection broke."""
    if isinstance(request, pb.GenerateRequest):
        request.resume.SetInParent()
    return request


class Progress:
    """What has come of one stream. Costs a list's growth per delta."""

    def __init__(self, request: pb.GenerateStreamRequest, tries: Tries) -> None:
        """`request` gets an id if it has none."""
        self._request: pb.GenerateStreamRequest = named(request)
        self.tries = tries
        count = request.sampling.n if request.sampling.HasField("n") else 1
        self._begun = self._resuming = False
        self._resume = pb.Resume(outputs=[pb.ResumeOutput()] * max(1, count))

    def request(self) -> pb.GenerateStreamRequest:
        """What to ask a gateway for: all of it at first, later the rest."""
        if self._resuming:
            self._request.resume.CopyFrom(self._resume if self._begun else pb.Resume())
        self._resuming = True
        return self._request

    def pause_after(self, exc: grpc.RpcError, *, at: int) -> float:
        """As of `Tries`. A sampled stream whose seed the gateway didn't tell can't go on."""
        seedless = not self._resume.HasField("seed") and not self._request.sampling.HasField("seed")
        return self.tries.pause_after(exc, at=at, final=self._begun and seedless)

    def take(self, response: pb.GenerateStreamResponse) -> Iterator[Event]:
        """Events for the caller, who is told the beginning once."""
        kind = response.WhichOneof("event")
        if kind == "prompt":
            if self._begun:
                self._check(response.prompt)
                return
            self._begin(response.prompt)
        elif kind == "delta":
            delta, outputs = response.delta, self._resume.outputs
            if delta.index < len(outputs):
                outputs[delta.index].token_ids.extend(delta.token_ids)
                outputs[delta.index].text_bytes += len(delta.text.encode())
            self.tries.succeeded()
        elif kind == "finished" and response.finished.index < len(self._resume.outputs):
            self._resume.outputs[response.finished.index].finish_reason = response.finished.finish_reason
            self.tries.succeeded()
        yield from convert.events_of(response)

    def _begin(self, prompt: pb.PromptAccepted) -> None:
        self._begun = True
        self.tries.begun()
        if prompt.HasField("seed"):
            self._resume.seed = prompt.seed
        self._resume.model_id, self._resume.numerics_id = prompt.model_id, prompt.numerics_id

    @staticmethod
    def _check(prompt: pb.PromptAccepted) -> None:
        """A gateway of before resuming would begin again, and the caller would get everything twice."""
        if not prompt.HasField("seed"):
            raise IncompatibleError("the next gateway is of a version that can't go on with a stream")
