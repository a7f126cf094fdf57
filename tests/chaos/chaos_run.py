"""One chaos run from start to verdict.

Start all -> the undisturbed answers -> streams and faults, with quiet moments between in which nothing may be held ->
stop all. Every stream must have said exactly what it says undisturbed.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from chaos_faults import Faults, draw
from chaos_leaks import Leaks
from chaos_outages import Outages
from chaos_stack import Stack, children
from chaos_streams import DEADLINE, Answer, Clients, answer_of, cases, difference

from tandem.client import AsyncClient

QUIET_EVERY = 60.0
PROGRESS_EVERY = 10.0
LOOK_EVERY = 0.2
WORKER_FLAGS = ("--compute", "exact", "--threads", "1", "--num-blocks", "256", "--drain-grace", "1")
GATEWAY_FLAGS = ("--drain-grace", "1", "--max-deaths", "1000", "--max-migrations", "1000")
"""A request may meet any number of faults here; a gateway that takes it for their cause would be right elsewhere."""


@dataclass(frozen=True)
class Settings:
    """Of one run."""

    model: Path
    seed: int
    seconds: float
    streams: int = 16
    pause: float = 1.0
    """Seconds between a fault and the next, beside what it takes until each role has a worker."""


@dataclass
class Verdict:
    """How it went."""

    seed: int
    seconds: float = 0.0
    streams: int = 0
    tokens: int = 0
    excused: int = 0
    """Streams that failed while no process of some role was alive for longer than their deadline."""
    faults: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    rss_mib: list[int] = field(default_factory=list)
    fault_log: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """See the module."""

    def __init__(self, settings: Settings, log: IO[str]) -> None:
        """`log` takes what the processes log."""
        self._settings, self._log = settings, log
        self._verdict = Verdict(settings.seed)
        self._began = time.monotonic()

    async def run(self) -> Verdict:
        """Never raises for what processes do: it is in the verdict."""
        settings, verdict = self._settings, self._verdict
        before, segments = children(), _segments()
        stack = Stack(settings.model, self._log, worker=WORKER_FLAGS, gateway=GATEWAY_FLAGS, grpc_only=(1,))
        async with stack:
            self._say("all processes are up")
            clients = await self._reference(stack)
            await self._disturb(stack, clients)
        verdict.problems += stack.problems
        if left := children() - before:
            verdict.problems.append(f"{len(left)} processes are left")
        if left_segments := _segments() - segments:
            verdict.problems.append(f"shared memory is left: {sorted(left_segments)}")
        verdict.seconds = round(time.monotonic() - self._began, 1)
        return verdict

    async def _reference(self, stack: Stack) -> Clients:
        """The undisturbed answers, from two gateways, which must agree."""
        wanted = cases(self._settings.seed)

        async def at(address: str) -> list[Answer]:
            async with AsyncClient(address) as client:
                return await asyncio.gather(*(answer_of(client, case) for case in wanted))

        answers = await asyncio.gather(*(at(address) for address in stack.addresses))
        for number, (one, other) in enumerate(zip(*answers, strict=True)):
            if problem := difference(one, other):
                self._verdict.problems.append(f"undisturbed, case {number}: {problem}")
        self._say(f"{len(wanted)} undisturbed answers")
        return Clients(stack.addresses, wanted, answers[0], self._settings.seed, self._settings.streams)

    async def _disturb(self, stack: Stack, clients: Clients) -> None:
        faults, leaks = Faults(stack), Leaks(stack)
        await leaks.look()
        streams = asyncio.create_task(clients.run())
        ticker = asyncio.create_task(self._tick(clients, faults))
        outages = clients.outages = Outages(stack.roles_up)
        watcher = asyncio.create_task(_watch(outages))
        try:
            ends = time.monotonic() + self._settings.seconds
            while time.monotonic() < ends and not self._failed(clients, leaks):
                await self._storm(stack, faults, min(ends, time.monotonic() + QUIET_EVERY))
                await self._quiet(stack, clients, faults, leaks)
        except TimeoutError:
            self._verdict.problems.append("the stack did not come back")
        finally:
            ticker.cancel()
            await faults.end()
            clients.stopping = True
            await asyncio.wait({streams}, timeout=DEADLINE + 30)
            self._conclude(clients, faults, leaks)
            streams.cancel()
            watcher.cancel()
            await asyncio.gather(streams, ticker, watcher, return_exceptions=True)

    async def _storm(self, stack: Stack, faults: Faults, until: float) -> None:
        """One fault after the other, each as soon as every role has a worker again."""
        while time.monotonic() < until:
            await asyncio.sleep(self._settings.pause)
            await stack.until(stack.each_role_up, 120)
            faults.inject(draw(self._settings.seed, len(faults.log), stack))

    async def _quiet(self, stack: Stack, clients: Clients, faults: Faults, leaks: Leaks) -> None:
        """All faults end, all streams end, nothing is held."""
        await faults.end()
        clients.paused = True
        await stack.until(lambda: stack.all_up() and not clients.running, DEADLINE + 60)
        await leaks.look()
        self._say(f"quiet: {clients.completed} streams so far, RSS {leaks.rss[-1] >> 20} MiB")
        clients.paused = False

    def _failed(self, clients: Clients, leaks: Leaks) -> bool:
        return bool(clients.failures or leaks.problems)

    def _conclude(self, clients: Clients, faults: Faults, leaks: Leaks) -> None:
        verdict = self._verdict
        verdict.streams, verdict.tokens, verdict.excused = clients.completed, clients.tokens, clients.excused
        verdict.fault_log = faults.log
        for entry in faults.log:
            verdict.faults[entry["kind"]] = verdict.faults.get(entry["kind"], 0) + 1
        verdict.problems += [*clients.failures, *leaks.problems]
        verdict.rss_mib = [rss >> 20 for rss in leaks.rss]
        if clients.running:
            verdict.problems.append(f"{clients.running} streams never ended")

    async def _tick(self, clients: Clients, faults: Faults) -> None:
        while True:
            await asyncio.sleep(PROGRESS_EVERY)
            last = faults.log[-1] if faults.log else {}
            self._say(
                f"{clients.completed} streams, {clients.tokens} tokens, {len(clients.failures)} failed, "
                f"{len(faults.log)} faults, the last: {last.get('kind', '-')} {last.get('target', '')}"
            )

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)


async def _watch(outages: Outages) -> None:
    while True:
        outages.look()
        await asyncio.sleep(LOOK_EVERY)


def _segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}
