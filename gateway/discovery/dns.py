"""Workers behind DNS names, such as those of headless Services (`--workers-dns ROLE=NAME:PORT`).

Each name is resolved again every few seconds, by the system's own resolver in a thread (asyncio's getaddrinfo). A name
that can't be resolved keeps its last answer for a while, whatever the reason: an empty Service and a name server that
has just started answer alike, and workers that are gone are found out by themselves.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from gateway.discovery.source import Addresses, Report, Role
from tandem.service.address import Address
from tandem.service.logging import get_logger

_log = get_logger(__name__)

INTERVAL_SECONDS = 5.0
KEEP_SECONDS = 60.0
JITTER = 0.2
"""Share of the interval by which lookups of several gateways drift apart."""
Resolve = Callable[[Address], Awaitable[list[Address]]]


@dataclass(frozen=True)
class Pace:
    """Seconds."""

    interval: float = INTERVAL_SECONDS
    keep: float = KEEP_SECONDS
    """How long the last answer stands in for those that fail."""


async def resolve(name: Address) -> list[Address]:
    """All addresses of one family, the one that has more of them: a pod with two addresses is one worker. Raises
    OSError.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
    if not found:
        return []
    family = Counter(item[0] for item in found).most_common(1)[0][0]
    return [Address(str(item[4][0]), name.port) for item in found if item[0] == family]


class DnsWorkers:
    """One name a role, each followed by a task of its own."""

    def __init__(
        self,
        names: Mapping[Role, Address],
        pace: Pace | None = None,
        *,
        resolver: Resolve = resolve,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`resolver` raises OSError; `draw` gives numbers in [0, 1) for the jitter."""
        self._names, self._pace = dict(names), pace or Pace()
        self._resolver, self._draw = resolver, draw
        self._known: dict[Role, tuple[str, ...]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, report: Report) -> None:
        """The first lookups begin."""
        for role, name in self._names.items():
            self._tasks.append(asyncio.create_task(self._follow(role, name, report), name=f"resolve {name}"))

    async def _follow(self, role: Role, name: Address, report: Report) -> None:
        loop = asyncio.get_running_loop()
        good_until, told = loop.time() + self._pace.keep, ""
        while True:
            try:
                found = await self._resolver(name)
                good_until, told = loop.time() + self._pace.keep, ""
                self._learn(role, found, report)
            except (OSError, UnicodeError) as exc:
                reason = str(exc)
                if reason != told:
                    _log.warning("a name can't be resolved", worker_role=role, name=str(name), reason=reason)
                told = reason
                report.trouble(f"{name}: {reason}")
                if loop.time() >= good_until and self._known.get(role):
                    _log.error("a name was not resolved for long; its workers are let go", name=str(name))
                    self._learn(role, [], report)
            await asyncio.sleep(self._pace.interval * (1 + JITTER * (2 * self._draw() - 1)))

    def _learn(self, role: Role, found: list[Address], report: Report) -> None:
        # Resolvers answer in any order.
        addresses = tuple(sorted({str(address) for address in found}))
        if self._known.get(role) != addresses:
            self._known[role] = addresses
            report.found(Addresses(self._known.get("prefill", ()), self._known.get("decode", ())))

    async def close(self) -> None:
        """Resolves no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
