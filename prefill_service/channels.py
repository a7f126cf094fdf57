"""Connections to decode workers, for KV alone: one per address, kept while used and a while after. Of the event loop.

Life cycle: Channels() -> `borrow(address)` around each transfer -> `close()`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from tandem.service.channel import open_channel

MOST_IDLE = 64


class Channels:
    """Channels by HOST:PORT. At most `most_idle` stay open without a user; the one used longest ago goes first."""

    def __init__(self, most_idle: int = MOST_IDLE) -> None:
        """Opens nothing."""
        self._most_idle = most_idle
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._users: Counter[str] = Counter()

    def __len__(self) -> int:
        """Open channels."""
        return len(self._channels)

    @asynccontextmanager
    async def borrow(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """The channel of `address`, which must be HOST:PORT."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(address, for_bulk=True)
        self._channels.move_to_end(address)
        self._users[address] += 1
        try:
            yield channel
        finally:
            self._users[address] -= 1
            if not self._users[address]:
                del self._users[address]
            await self._close_idle()

    async def _close_idle(self) -> None:
        idle = [address for address in self._channels if address not in self._users]
        # Taken out before the first wait: nobody may borrow one that is about to close.
        for channel in [self._channels.pop(address) for address in idle[: max(0, len(idle) - self._most_idle)]]:
            await channel.close()

    async def close(self) -> None:
        """Close all, in use or not."""
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels))
