"""Connections to decode workers, for KV alone: a few per address, kept while used and a while after. Of the event loop.

Transfers at one time go over connections of their own, up to LANES: blocks of one needn't queue behind another's.

With TLS a renewed certificate is for new connections: the next transfer opens one, the old one goes with its last user.

Life cycle: Channels() -> `borrow(address)` around each transfer -> `close()`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from tandem.service.channel import open_service_channel
from tandem.service.tls import Tls

MOST_IDLE = 64
LANES = 4
_Key = tuple[str, int, int]
"""Address, version of the certificate, and lane."""


class Channels:
    """Channels by HOST:PORT and lane. At most `most_idle` stay open without a user, those used last."""

    def __init__(self, most_idle: int = MOST_IDLE, tls: Tls | None = None) -> None:
        """Opens nothing."""
        self._most_idle, self._tls = most_idle, tls
        self._channels: OrderedDict[_Key, grpc.aio.Channel] = OrderedDict()
        self._users: Counter[_Key] = Counter()

    def __len__(self) -> int:
        """Open channels."""
        return len(self._channels)

    @asynccontextmanager
    async def borrow(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """A channel to `address`, which must be HOST:PORT: the one with the fewest users."""
        key = self._least_used(address)
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = open_service_channel(address, "decode", self._tls, for_bulk=True)
        self._channels.move_to_end(key)
        self._users[key] += 1
        try:
            yield channel
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
            await self._close_idle()

    def _least_used(self, address: str) -> _Key:
        """An open one that nobody uses before a new one, a new one before one that is in use."""
        version = self._tls.version if self._tls is not None else 0
        keys = [(address, version, lane) for lane in range(LANES)]
        return min(keys, key=lambda key: (self._users[key], key not in self._channels))

    async def _close_idle(self) -> None:
        newest = max((certificate for _, certificate, _ in self._channels), default=0)
        idle = [key for key in self._channels if key not in self._users]
        current = [key for key in idle if key[1] == newest]
        gone = [key for key in idle if key[1] != newest] + current[: max(0, len(current) - self._most_idle)]
        # Taken out before the first wait: nobody may borrow one that is about to close.
        for channel in [self._channels.pop(key) for key in gone]:
            await channel.close()

    async def close(self) -> None:
        """Close all, in use or not."""
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels))
