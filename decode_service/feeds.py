"""Feeds: the tokens of many requests on one stream to their gateway. Belongs to the event loop.

A message a request and step costs both sides far more than its tokens; a feed sends one a step. Life cycle of a `Feed`:
`Feeds.opened` by a gateway's WatchTokens -> `put` by the engine's publications -> `get` by the RPC's writer -> closed
when the RPC ends (what was not delivered is lost, and the gateway starts those requests anew), or by `Feeds.close`,
after which what waits still goes out. A gateway that reads too slowly loses its feed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from decode_service.streams import join, slow_reader
from tandem.errors import InvalidRequestError, OverloadedError, TandemError
from tandem.record import TokenDelta

DEFAULT_LIMIT = 1 << 16
"""Tokens that may wait for one gateway."""
MAX_ID = 64
MAX_FEEDS = 256
"""Gateways need one each, and one more while an old one ends."""


class Feed:
    """What the requests of one gateway have produced and it hasn't taken yet."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        """`limit` is in tokens."""
        self._limit = limit
        self._waiting = 0
        self._deltas: dict[int, list[TokenDelta]] = {}
        self._ready = asyncio.Event()
        self._error: TandemError | None = None
        self._overflowed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def overflowed(self) -> asyncio.Future[None]:
        """Gets the exception that ends the feed even while its writer is blocked."""
        return self._overflowed

    @property
    def open(self) -> bool:
        """False once it has ended: tokens must go another way."""
        return self._error is None

    def put(self, number: int, deltas: list[TokenDelta]) -> None:
        """Takes in tokens of request `number`. Ignored once it has ended."""
        if self._error is not None:
            return
        waiting = self._deltas.setdefault(number, [])
        for delta in deltas:
            join(waiting, delta)
            self._waiting += len(delta.token_ids)
        if self._waiting > self._limit:
            error = slow_reader("the gateway", self._limit)
            self._deltas.clear()
            self._overflowed.set_exception(error)
            self._overflowed.exception()  # retrieved here: a feed that ends another way must not log it
            self.close(error)
        self._ready.set()

    def close(self, error: TandemError) -> None:
        """Ends it with `error` behind what waits. The first error stays."""
        self._error = self._error or error
        self._ready.set()

    async def get(self) -> dict[int, list[TokenDelta]]:
        """Everything that waits, by request; raises the error that ended the feed once nothing does."""
        await self._ready.wait()
        self._ready.clear()
        deltas, self._deltas, self._waiting = self._deltas, {}, 0
        if self._error is not None:
            if not deltas:
                raise self._error
            self._ready.set()
        return deltas


class Feeds:
    """The open feeds of one decode worker."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        """`limit` is in tokens for each."""
        self._limit = limit
        self._feeds: dict[str, Feed] = {}

    def get(self, feed_id: str) -> Feed | None:
        """The open feed of that id."""
        feed = self._feeds.get(feed_id)
        return feed if feed is not None and feed.open else None

    @contextlib.contextmanager
    def opened(self, feed_id: str) -> Iterator[Feed]:
        """A new feed, for as long as its RPC lasts. Raises InvalidRequestError."""
        if not 1 <= len(feed_id) <= MAX_ID:
            raise InvalidRequestError(f"feed_id must have 1 to {MAX_ID} characters", field="feed_id")
        if len(self._feeds) >= MAX_FEEDS:
            raise OverloadedError(f"{MAX_FEEDS} feeds are open, which is the most", reason="TOO_MANY_FEEDS")
        if feed_id in self._feeds:
            raise InvalidRequestError(f"feed_id: {feed_id!r} is in use", field="feed_id")
        feed = self._feeds[feed_id] = Feed(self._limit)
        try:
            yield feed
        finally:
            del self._feeds[feed_id]

    def close(self, error: TandemError) -> None:
        """Ends all of them, after what waits."""
        for feed in self._feeds.values():
            feed.close(error)
