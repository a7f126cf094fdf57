"""Gateways, prefill and decode workers as real processes, each kept running, with a proxy on every link between two.

Life cycle: `Stack(...)` -> `async with stack:` starts all and waits until all are ready -> faults from outside ->
the end stops every process. A process that dies is started again; its proxies lead to it once it is ready.

Clients reach gateway g through `fronts[g]`. Gateway g reaches worker w through `links[g, w]`, and so do prefill workers
that send to w for a request of g: addresses travel with requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from chaos_proxy import Proxy

from tandem.supervisor.process import Process, Ready
from tandem.supervisor.settings import Role

RESTART_PAUSE = 0.2
START_SECONDS = 120.0
STOP_SECONDS = 15.0


@dataclass(eq=False)
class Place:
    """One process, whichever runs there now."""

    role: Role
    index: int
    arguments: list[str]
    log: IO[str]
    proxies: list[Proxy] = field(default_factory=list)
    """Of all who connect to it."""
    process: Process | None = None
    said: Ready | None = None
    held: bool = False
    """SIGSTOPped."""
    starts: int = 0
    asked_to_stop: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.role}-{self.index}"

    @property
    def up(self) -> bool:
        """It serves."""
        return self.said is not None and not self.held

    async def keep(self) -> None:
        """Starts it again and again, until cancelled."""
        while True:
            await self._live()
            await asyncio.sleep(RESTART_PAUSE)

    async def _live(self) -> None:
        self.starts += 1
        self.asked_to_stop = False
        self.process = await Process.launch(self.name, self.role, self.arguments, self._log)
        async with asyncio.timeout(START_SECONDS):
            self.said = await self.process.ready()
        if self.said is None:
            if self.process.returncode != -signal.SIGKILL:
                self.problems.append(f"{self.name} did not start: {self.process.error_line()}")
            return
        for proxy in self.proxies:
            proxy.target = self.said.address
        code = await self.process.exited()
        self.said, self.held = None, False
        await self.process.reap()
        if code not in (0, -signal.SIGKILL) or (code == 0) != self.asked_to_stop:
            self.problems.append(f"{self.name} ended with code {code}, asked to stop: {self.asked_to_stop}")

    def _log(self, name: str, line: str) -> None:
        self.log.write(f"{name} {self.process.pid if self.process else ''} {line}\n")

    def signal(self, number: signal.Signals) -> None:
        """To the process alone."""
        if self.process is None:
            return
        if number in (signal.SIGTERM, signal.SIGKILL):
            self.asked_to_stop = number == signal.SIGTERM
        if number in (signal.SIGSTOP, signal.SIGCONT):
            self.held = number == signal.SIGSTOP
        self.process.signal(number)

    async def stop(self) -> None:
        """SIGTERM; what is left after a while is a problem, and killed."""
        if self.process is None or self.process.returncode is not None:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self.process.exited()
        code = self.process.returncode
        if code is None:
            self.problems.append(f"{self.name} did not stop on SIGTERM within {STOP_SECONDS:g} s")
            self.process.kill()
            await self.process.exited()
        elif code != 0:
            self.problems.append(f"{self.name} ended with code {code} on SIGTERM")
        await self.process.reap()


class Stack:
    """See the module's life cycle."""

    def __init__(
        self,
        model: Path,
        log: IO[str],
        *,
        gateways: int = 2,
        prefill: int = 2,
        decode: int = 2,
        worker: tuple[str, ...] = (),
        gateway: tuple[str, ...] = (),
        grpc_only: tuple[int, ...] = (),
    ) -> None:
        """`worker` and `gateway` are more flags; prefill workers in `grpc_only` send over the network."""
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-chaos-")
        common = ["--model", str(model), "--log-level", "info"]
        self.places: list[Place] = []
        for role, count in (("prefill", prefill), ("decode", decode)):
            for index in range(count):
                wire = ["--transport", "grpc"] if role == "prefill" and index in grpc_only else []
                self.places.append(Place(role, index, [*common, *worker, *wire], log))  # type: ignore[arg-type]
        workers = list(self.places)
        self.fronts = [Proxy() for _ in range(gateways)]
        self.links: dict[tuple[int, str], Proxy] = {}
        for index in range(gateways):
            flags = [*common, *gateway, "--workers-file", str(self._workers_file(index))]
            self.places.append(Place("gateway", index, flags, log, [self.fronts[index]]))
            for place in workers:
                self.links[index, place.name] = Proxy()
                place.proxies.append(self.links[index, place.name])
        self._keepers: list[asyncio.Task[None]] = []

    def _workers_file(self, gateway: int) -> Path:
        return Path(self._folder.name) / f"workers-{gateway}.json"

    def of(self, role: str) -> list[Place]:
        """The places of a role."""
        return [place for place in self.places if place.role == role]

    @property
    def workers(self) -> list[Place]:
        """Prefill and decode."""
        return [place for place in self.places if place.role != "gateway"]

    @property
    def all_proxies(self) -> dict[str, Proxy]:
        """Every link, by a name for people."""
        named = {f"client>gateway-{i}": proxy for i, proxy in enumerate(self.fronts)}
        return {**named, **{f"gateway-{g}>{name}": proxy for (g, name), proxy in self.links.items()}}

    @property
    def addresses(self) -> list[str]:
        """Of the gateways, for clients."""
        return [proxy.address for proxy in self.fronts]

    @property
    def problems(self) -> list[str]:
        """What processes did that none may."""
        return [problem for place in self.places for problem in place.problems]

    def roles_up(self) -> dict[str, bool]:
        """Whether at least one process of a role serves."""
        return {role: any(place.up for place in self.of(role)) for role in {place.role for place in self.places}}

    def each_role_up(self) -> bool:
        """At least one process of each role serves."""
        return all(self.roles_up().values())

    def all_up(self) -> bool:
        """All of them."""
        return all(place.up for place in self.places)

    async def __aenter__(self) -> Self:
        """Starts; what doesn't come up in time leaves no process."""
        for proxy in self.all_proxies.values():
            await proxy.start()
        for gateway in range(len(self.fronts)):
            lists = {
                role: [self.links[gateway, p.name].address for p in self.of(role)] for role in ("prefill", "decode")
            }
            self._workers_file(gateway).write_text(json.dumps(lists))
        self._keepers = [asyncio.create_task(place.keep(), name=place.name) for place in self.places]
        try:
            await self.until(self.all_up, START_SECONDS)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops, gateways first."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for role in ("gateway", "prefill", "decode"):
            await asyncio.gather(*(place.stop() for place in self.of(role)))
        for proxy in self.all_proxies.values():
            await proxy.close()
        self._folder.cleanup()

    async def until(self, condition: object, seconds: float) -> None:
        """Waits for a condition that processes bring about. Raises TimeoutError, or what a keeper raised."""
        assert callable(condition)
        async with asyncio.timeout(seconds):
            while not condition():
                for keeper in self._keepers:
                    if keeper.done():
                        keeper.result()
                await asyncio.sleep(0.05)


def children() -> set[int]:
    """Process ids of our children, zombies included."""
    mine = os.getpid()
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == mine:
                    found.add(int(entry.name))
    return found
