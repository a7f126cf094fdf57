"""The bounded buffer between the engine and one client's stream. Belongs to the event loop.

Life cycle: made before the request is admitted -> `put` by the engine's publications -> `get` by the RPC's writer,
until the request has ended or `fail` gives an error. A reader that is too slow costs only its own stream: when more
than `limit` tokens wait, the buffer is dropped and the stream fails with SLOW_READER.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableSequence
from dataclasses import dataclass
from typing import Any

from decode_service.events import Ended, Event, Finished, Tokens
from tandem.errors import OverloadedError, TandemError
from tandem.record import TokenDelta
from worker.events import Failed


@dataclass(frozen=True, slots=True)
class Pulse:
    """The engine lives: its step counter."""

    steps: int


@dataclass(frozen=True, slots=True)
class Retargeted:
    """The answer to a Retarget."""

    attempt: int
    committed: bool
    needed_start: int = 0
    needed_end: int = 0


Item = TokenDelta | Finished | Ended | Pulse | Retargeted
DEFAULT_LIMIT = 4096
"""Tokens that may wait for one client."""


def join(items: MutableSequence[Any], delta: TokenDelta) -> None:
    """Adds `delta` behind `items`, to the last of them when that is of the same output."""
    last = items[-1] if items else None
    if isinstance(last, TokenDelta) and last.index == delta.index:
        last.token_ids.extend(delta.token_ids)
        last.logprobs.extend(delta.logprobs)
        last.drafted += delta.drafted
        last.accepted += delta.accepted
    else:
        items.append(delta)


def slow_reader(who: str, limit: int) -> OverloadedError:
    """What ends a buffer with more than `limit` tokens."""
    return OverloadedError(
        f"{who} reads too slowly: more than {limit} tokens wait for it", retry_after=None, reason="SLOW_READER"
    )


class OutputStream:
    """What one request has produced and its client hasn't taken yet."""

    def __init__(self, limit: int = DEFAULT_LIMIT, feed_id: str = "", feed_number: int = 0) -> None:
        """`limit` is in tokens. `feed_id` and `feed_number` say where the tokens go while that feed is open."""
        self._limit = limit
        self.feed_id, self.feed_number = feed_id, feed_number
        self._waiting = 0
        self._items: list[Item] = []
        self._ready = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = False
        """True once the request is over; nothing is to be cancelled any more."""

    @property
    def failed(self) -> asyncio.Future[None]:
        """Gets the exception that ends the stream, even while its writer is blocked."""
        return self._failed

    def put(self, event: Event) -> None:
        """Take in one event of this request. Ignored after a failure."""
        if self._failed.done():
            return
        if isinstance(event, Failed):
            self.ended = True
            self.fail(event.error)
            return
        if isinstance(event, Tokens):
            for delta in event.deltas:
                self._append(delta)
        else:
            self.ended = self.ended or isinstance(event, Ended)
            self._items.append(event)
        self._added()

    def answer(self, answer: Retargeted) -> None:
        """Send an answer behind what waits; it counts as one token."""
        if not self._failed.done():
            self._waiting += 1
            self._items.append(answer)
            self._added()

    def pulse(self, steps: int) -> None:
        """A heartbeat; at most one waits, behind everything else."""
        if self._failed.done() or self.ended:
            return
        self._items = [item for item in self._items if not isinstance(item, Pulse)]
        self._items.append(Pulse(steps))
        self._ready.set()

    def _added(self) -> None:
        if self._waiting > self._limit:
            self.fail(slow_reader("the client", self._limit))
        self._ready.set()

    def _append(self, delta: TokenDelta) -> None:
        """Joins consecutive tokens of an output while nobody takes them."""
        self._waiting += len(delta.token_ids)
        join(self._items, delta)

    def fail(self, error: TandemError) -> None:
        """End the stream with an error; what waits in it is dropped. The first error stays."""
        if not self._failed.done():
            self._items.clear()
            self._waiting = 0
            self._failed.set_exception(error)
            self._failed.exception()  # retrieved here: a stream that ends another way must not log it
            self._ready.set()

    async def get(self) -> list[Item]:
        """Everything that waits, at least one item. Raises the error that ended the stream."""
        await self._ready.wait()
        self._ready.clear()
        if self._failed.done():
            self._failed.result()
        items, self._items, self._waiting = self._items, [], 0
        return items
