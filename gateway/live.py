"""The requests under way, by tenant and request id.

Life cycle of an entry: `async with live.enter(tenant, request_id, takes_over=...)` around the whole of a request, and
`take_over` once it is known to be valid. A second one of the same tenant and id is refused, since two answers to one id
help nobody. But a client that says it goes on with a broken stream (`resume`) is believed: its old connection may hang
here unnoticed for as long as keepalive takes, so at `take_over` the old request ends with StaleError, which frees its
workers at once, and the new one runs. Until then the old one lives: a request that is refused ends nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from tandem.errors import DrainingError, InvalidRequestError, StaleError

_Key = tuple[str, str]


class Entry:
    """Ends the block that it surrounds when a later one takes it over."""

    def __init__(self, entries: dict[_Key, Entry], key: _Key, number: int) -> None:
        """One of `entries` at once if `key` is free, else with `take_over`. `number` counts up as requests arrive."""
        self._entries, self._key, self._number = entries, key, number
        self._scope = asyncio.timeout(None)
        self._superseded = False
        entries.setdefault(key, self)

    def take_over(self) -> None:
        """Ends the one that has the key. Raises StaleError when that one came later."""
        holder = self._entries.get(self._key, self)
        if holder._number > self._number:
            raise _superseded()
        if holder is not self:
            holder._supersede()
        self._entries[self._key] = self

    def leave(self) -> None:
        """The key is free again, unless another has it."""
        if self._entries.get(self._key) is self:
            del self._entries[self._key]

    def _supersede(self) -> None:
        self._superseded = True
        self._scope.reschedule(asyncio.get_running_loop().time())

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._scope.__aexit__(kind, value, traceback)
        except TimeoutError:
            if self._superseded:
                raise _superseded() from None
            raise


def _superseded() -> StaleError:
    return StaleError("the request goes on over another connection", reason="SUPERSEDED")


class LiveRequests:
    """Belongs to the event loop."""

    def __init__(self) -> None:
        """None yet."""
        self._entries: dict[_Key, Entry] = {}
        self._numbers = itertools.count()
        self._count = 0
        self.draining = False
        """Nothing new comes in."""
        self.idle = asyncio.Event()
        """No request is left, those that were taken over included."""
        self.idle.set()

    @contextlib.asynccontextmanager
    async def enter(self, tenant: str, request_id: str, *, takes_over: bool) -> AsyncIterator[Entry]:
        """Raises DrainingError, InvalidRequestError for an id in use, StaleError when another took this one over."""
        if self.draining:
            raise DrainingError("the gateway is about to stop")
        key = (tenant, request_id)
        if key in self._entries and not takes_over:
            raise InvalidRequestError(f"request_id: {request_id!r} is in use", field="request_id")
        self._count += 1
        self.idle.clear()
        entry = Entry(self._entries, key, next(self._numbers))
        try:
            async with entry:
                yield entry
        finally:
            entry.leave()
            self._count -= 1
            if not self._count:
                self.idle.set()
