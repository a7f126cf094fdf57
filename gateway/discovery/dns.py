"""Workers behind DNS names, such as those of headless Services (`--workers-dns ROLE=NAME:PORT`).

Each name is resolved again every few seconds, by the system's own resolver in a thread (asyncio's getaddrinfo). A name
of which the answer is that there is none keeps its last addresses for a while: an empty Service and a name server that
has just started answer alike. While there is no answer at all they are kept: workers must not be lost with the name
server, and those that are gone are found out by themselves.
"""

from __future__ import annotations

import asyncio
import random
import socket
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
_NO_ADDRESS = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
"""What an empty Service's name is answered, or one that doesn't exist. SERVFAIL and silence are EAI_AGAIN."""
Resolve = Callable[[Address], Awaitable[list[Address]]]


@dataclass(frozen=True)
class Pace:
    """Seconds."""

    interval: float = INTERVAL_SECONDS
    keep: float = KEEP_SECONDS
    """How long the last addresses stand in for none."""


async def resolve(name: Address) -> list[Address]:
    """All addresses. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "no address")
    return [Address(str(item[4][0]), name.port) for item in found]


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
        keep_until, told = loop.time() + self._pace.keep, ""
        while True:
            problem = await self._look(role, name, report)
            if problem is None or not _says_none(problem):
                keep_until = loop.time() + self._pace.keep
            elif loop.time() >= keep_until and self._known.get(role):
                _log.error("a name has had no address for long; its workers are let go", name=str(name))
                self._learn(role, [], report)
            reason = "" if problem is None else str(problem)
            if reason and reason != told:
                _log.warning("a name can't be resolved", worker_role=role, name=str(name), reason=reason)
            told = reason
            await asyncio.sleep(self._pace.interval * (1 + JITTER * (2 * self._draw() - 1)))

    async def _look(self, role: Role, name: Address, report: Report) -> Exception | None:
        """One lookup; why it brought nothing."""
        try:
            self._learn(role, await self._resolver(name), report)
        except (OSError, UnicodeError) as exc:
            report.trouble(f"{name}: {exc}")
            return exc
        return None

    def _learn(self, role: Role, found: list[Address], report: Report) -> None:
        # Resolvers answer in any order.
        addresses = tuple(sorted({str(address) for address in _one_family(found, self._known.get(role, ()))}))
        if self._known.get(role) != addresses:
            self._known[role] = addresses
            report.found(Addresses(self._known.get("prefill", ()), self._known.get("decode", ())))

    async def close(self) -> None:
        """Resolves no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _one_family(found: list[Address], known: tuple[str, ...]) -> list[Address]:
    """A pod with two addresses is one worker: those of the family that is `known`, else of the one that has more. What
    is published of one family a moment later than of the other must not replace every worker.
    """
    families: dict[bool | None, list[Address]] = {}
    for address in found:
        families.setdefault(":" in address.host, []).append(address)
    before = ":" in known[0].rpartition(":")[0] if known else None
    return families.get(before) or max(families.values(), key=len, default=[])


def _says_none(problem: Exception) -> bool:
    """The answer is that there is no address; otherwise there was no answer."""
    return isinstance(problem, socket.gaierror) and problem.errno in _NO_ADDRESS
