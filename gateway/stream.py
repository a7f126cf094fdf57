"""The bounded way of events from a request to its client.

Life cycle: `EventBuffer` -> `put` by the request, async iteration by one writer -> `close` when no more will come. A
client that reads too slowly fills its own buffer, and its own request ends; nothing else waits for it. Deltas of one
choice that wait are joined: what the writer can't keep up with becomes fewer messages, each of which costs far more
than its tokens.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from gateway.plain import Delta, Event
from tandem.errors import OverloadedError


class SlowReaderError(OverloadedError):
    """The client's buffer is full."""

    default_reason = "SLOW_READER"


class EventBuffer:
    """One writer, one reader, one event loop."""

    def __init__(self, max_events: int) -> None:
        """Empty. A joined delta counts as many times as it has tokens."""
        self._events: deque[Event] = deque()
        self._max, self._waiting = max_events, 0
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        """Never waits; the event is the buffer's from now on. Raises SlowReaderError when full."""
        if self._waiting >= self._max:
            raise SlowReaderError(f"the client left {self._waiting} tokens unread", retry_after=None)
        last = self._events[-1] if self._events else None
        if isinstance(last, Delta) and isinstance(event, Delta) and last.index == event.index:
            self._waiting -= _weight(last)
            last.token_ids += event.token_ids
            last.text += event.text
            last.logprobs += event.logprobs
            self._waiting += _weight(last)
            return
        self._events.append(event)
        self._waiting += _weight(event)
        self._wake.set()

    def close(self) -> None:
        """The reader ends after what is left."""
        self._closed = True
        self._wake.set()

    def drop(self) -> None:
        """Forgets what wasn't read."""
        self._events.clear()
        self._waiting = 0

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events in order until `close`."""
        while True:
            while self._events:
                event = self._events.popleft()
                self._waiting -= _weight(event)
                yield event
            if self._closed:
                return
            self._wake.clear()
            await self._wake.wait()


def _weight(event: Event) -> int:
    return len(event.token_ids) or 1 if isinstance(event, Delta) else 1
