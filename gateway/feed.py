"""One stream with the tokens of all requests that this gateway runs on a decode worker.

Life cycle of a `TokenFeed`: made for one incarnation -> `run()` opens it -> `ready` once the worker says so; from then
on new requests `join` it and `leave` it -> over, when its stream ends, however that comes: whoever is aboard is told,
because tokens may be missing. A worker of an earlier version has none; its requests' own streams carry their tokens.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from typing import Any

import grpc

from gateway.ended import Ended, FeedLostError
from tandem.service.logging import get_logger
from tandem.v1 import decode_pb2

_log = get_logger(__name__)
Member = Callable[[Any], None]
"""Gets the deltas (protobuf) of each message, or `Ended`, after which nothing more comes."""


class TokenFeed:
    """Belongs to the event loop."""

    def __init__(self, stub: Any, incarnation: str) -> None:
        """`stub` is a DecodeServiceStub."""
        self.incarnation = incarnation
        self.feed_id = secrets.token_hex(16)
        self.ready = self.over = False
        self.unknown = False
        """The worker has no feeds."""
        self._stub = stub
        self._members: dict[int, Member] = {}
        self._numbers = itertools.count(1)

    def join(self, member: Member) -> int:
        """A request's number on the feed."""
        number = next(self._numbers)
        self._members[number] = member
        return number

    def leave(self, number: int) -> None:
        """Nothing more comes for that request."""
        self._members.pop(number, None)

    async def run(self) -> None:
        """Reads until the stream ends or the task is cancelled."""
        request = decode_pb2.WatchTokensRequest(feed_id=self.feed_id, incarnation=self.incarnation)
        rpc, why = None, "its stream ended"
        try:
            rpc = self._stub.WatchTokens(request)
            async for response in rpc:
                self.ready = True
                for tokens in response.requests:
                    if (member := self._members.get(tokens.number)) is not None:
                        member(tokens.deltas)
        except grpc.aio.AioRpcError as exc:
            self.unknown = exc.code() is grpc.StatusCode.UNIMPLEMENTED
            why = f"{exc.code().name}: {exc.details()}"
            if not self.unknown:
                _log.warning("token feed lost", incarnation=self.incarnation, members=len(self._members), reason=why)
        except Exception as exc:  # whatever it was: nobody may wait for tokens that don't come
            _log.error("a token feed can't be read", exc_info=exc)
            why = f"it can't be read: {exc}"
        finally:
            if rpc is not None:
                rpc.cancel()
            self.ready, self.over = False, True
            for member in list(self._members.values()):
                member(Ended(FeedLostError(f"the token feed was lost: {why}")))
