"""The requests under way, by tenant and request id.

Life cycle of an entry: `async with live.enter(tenant, request_id, takes_over=...)` around the whole of a request. A
second one of the same tenant and id is refused, since two answers to one id help nobody. But a client that says it
goes on with a broken stream (`resume`) is believed: its old connection may hang here unnoticed for as long as
keepalive takes, so the old request ends with StaleError, which frees its workers at once, and the new one runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from tandem.errors import DrainingError, InvalidRequestError, StaleError


class _Entry:
    """Ends the block that it surrounds when another takes it over."""

    def __init__(self) -> None:
        self._scope = asyncio.timeout(None)
        self._superseded = False

    def supersede(self) -> None:
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
                message = "the request goes on over another connection"
                raise StaleError(message, reason="SUPERSEDED") from None
            raise


class LiveRequests:
    """Belongs to the event loop."""

    def __init__(self) -> None:
        """None yet."""
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._count = 0
        self.draining = False
        """Nothing new comes in."""
        self.idle = asyncio.Event()
        """No request is left, those that were taken over included."""
        self.idle.set()

    @contextlib.asynccontextmanager
    async def enter(self, tenant: str, request_id: str, *, takes_over: bool) -> AsyncIterator[None]:
        """Raises DrainingError, InvalidRequestError for an id in use, StaleError when another took this one over."""
        if self.draining:
            raise DrainingError("the gateway is about to stop")
        key = (tenant, request_id)
        if (older := self._entries.get(key)) is not None:
            if not takes_over:
                raise InvalidRequestError(f"request_id: {request_id!r} is in use", field="request_id")
            older.supersede()
        self._count += 1
        self.idle.clear()
        entry = self._entries[key] = _Entry()
        try:
            async with entry:
                yield
        finally:
            if self._entries.get(key) is entry:
                del self._entries[key]
            self._count -= 1
            if not self._count:
                self.idle.set()
