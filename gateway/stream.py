"""The bounded way of events from a request to its client.

Life cycle: `EventBuffer` -> `put` by the request, async iteration by one writer -> `close` when no more will come. A
client that reads too slowly fills its own buffer, and its own request ends; nothing else waits for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from gateway.plain import Event
from tandem.errors import OverloadedError


class SlowReaderError(OverloadedError):
    """The client's buffer is full."""

    default_reason = "SLOW_READER"


class EventBuffer:
    """One writer, one reader, one event loop."""

    def __init__(self, max_events: int) -> None:
        """Empty."""
        self._events: deque[Event] = deque()
        self._max = max_events
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, event: Event) -> None:
        """Never waits. Raises SlowReaderError when full."""
        if len(self._events) >= self._max:
            raise SlowReaderError(f"the client left {self._max} events unread", retry_after=None)
        self._events.append(event)
        self._wake.set()

    def close(self) -> None:
        """The reader ends after what is left."""
        self._closed = True
        self._wake.set()

    def drop(self) -> None:
        """Forgets what wasn't read."""
        self._events.clear()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events in order until `close`."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self._closed:
                return
            self._wake.clear()
            await self._wake.wait()
