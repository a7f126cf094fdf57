"""Which fault comes next, and making it so.

A fault follows from the seed and its number alone, so a run can be repeated with the same faults in the same order;
when each comes follows from when processes are ready again.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import asdict, dataclass
from typing import Any

from chaos_stack import Stack

KINDS = {"kill": 4, "hang": 3, "term": 2, "cut": 3, "stall": 2, "slow": 1}
"""By how often they come."""
OF_LINKS = ("cut", "stall", "slow")
LONGEST = {"hang": 8.0, "stall": 20.0, "slow": 5.0}
"""Seconds. Three missed heartbeats are 3 s, an unanswered keepalive 15 s: both shorter and longer come."""
SLOW_BYTES_PER_SECOND = 200_000.0


@dataclass(frozen=True)
class Fault:
    """One. `seconds` of those that end by themselves."""

    number: int
    kind: str
    target: str
    seconds: float = 0.0


def draw(seed: int, number: int, stack: Stack) -> Fault:
    """The fault of that number."""
    rng = random.Random(f"{seed}/fault-{number}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    names = list(stack.all_proxies) if kind in OF_LINKS else [place.name for place in stack.places]
    seconds = round(rng.uniform(0.3, LONGEST[kind]), 2) if kind in LONGEST else 0.0
    return Fault(number, kind, rng.choice(names), seconds)


class Faults:
    """Makes faults and ends those that last."""

    def __init__(self, stack: Stack) -> None:
        """None yet."""
        self._stack = stack
        self._lasting: set[asyncio.Task[None]] = set()
        self._began = time.monotonic()
        self.log: list[dict[str, Any]] = []

    def inject(self, fault: Fault) -> None:
        """Begins it. A process that isn't there is spared."""
        self.log.append({"at": round(time.monotonic() - self._began, 1), **asdict(fault)})
        work = self._break_link(fault) if fault.kind in OF_LINKS else self._disturb(fault)
        task = asyncio.create_task(work, name=f"fault {fault.number}")
        self._lasting.add(task)
        task.add_done_callback(self._lasting.discard)

    async def _disturb(self, fault: Fault) -> None:
        (place,) = (place for place in self._stack.places if place.name == fault.target)
        process = place.process
        if fault.kind == "kill":
            place.signal(signal.SIGKILL)
        elif fault.kind == "term" and place.up and not place.asked_to_stop:  # a second one ends it at once, with code 1
            place.signal(signal.SIGTERM)
        elif fault.kind == "hang" and place.up:
            place.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                if place.process is process:  # it may have been killed and started again meanwhile
                    place.signal(signal.SIGCONT)

    async def _break_link(self, fault: Fault) -> None:
        proxy = self._stack.all_proxies[fault.target]
        if fault.kind == "cut":
            proxy.cut()
            return
        if fault.kind == "stall":
            proxy.stall()
        else:
            proxy.bytes_per_second = SLOW_BYTES_PER_SECOND
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            proxy.resume()
            proxy.bytes_per_second = 0.0

    async def end(self) -> None:
        """Ends those that last, before their time."""
        for task in list(self._lasting):
            task.cancel()
        await asyncio.gather(*self._lasting, return_exceptions=True)
