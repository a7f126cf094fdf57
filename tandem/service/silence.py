"""Finds streams that have fallen silent, and only those.

Life cycle: `async with Silence(seconds) as silence:` around the reading of a stream -> `heard()` at each message ->
TimeoutError out of the block when nothing came for that long.

The time counts in looks, several in each period: a process that was held up itself (a busy machine, a pause of the
collector) takes one look when it wakes, reads what has come meanwhile, and takes no live worker for a dead one.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

LOOKS = 6


class Silence:
    """Costs an assignment per message and one timer per stream."""

    def __init__(self, seconds: float) -> None:
        """Silence of more than `seconds`, at most a sixth more, is an error."""
        self._pause = seconds / LOOKS
        self._empty = 0
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    def heard(self) -> None:
        """The other side lives."""
        self._empty = 0

    def _look(self) -> None:
        self._empty += 1
        if self._empty > LOOKS:
            self._scope.reschedule(asyncio.get_running_loop().time())
        else:
            self._arm()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._pause, self._look)

    async def __aenter__(self) -> Self:
        """Starts to look."""
        await self._scope.__aenter__()
        self._arm()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops looking."""
        if self._timer is not None:
            self._timer.cancel()
        await self._scope.__aexit__(kind, value, traceback)
