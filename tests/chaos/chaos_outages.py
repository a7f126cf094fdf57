"""When a role had no process that serves: what a stream may fail of.

A stream must be completed unless no process of some role was alive for longer than the stream's deadline; then it may
fail, as unavailable or out of time, and in time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tandem.errors import DeadlineError, UnavailableError

LATE = 5.0
"""Seconds after its deadline in which a failed stream must have ended."""


@dataclass
class Outage:
    """Of one role, in seconds of the clock; it goes on while `end` grows."""

    role: str
    start: float
    end: float


class Outages:
    """Call `look` often."""

    def __init__(self, up: Callable[[], Mapping[str, bool]], clock: Callable[[], float] = time.monotonic) -> None:
        """`up`: whether a role has a process that serves now."""
        self._up, self.clock = up, clock
        self._now: dict[str, Outage] = {}
        self._all: list[Outage] = []

    def look(self) -> None:
        """Which roles are down now."""
        at = self.clock()
        for role, up in self._up().items():
            if up:
                self._now.pop(role, None)
                continue
            if role not in self._now:
                self._now[role] = Outage(role, at, at)
                self._all.append(self._now[role])
            self._now[role].end = at

    def excuse(self, error: Exception, began: float, deadline: float) -> bool:
        """Whether a stream that began then may fail like that now."""
        self.look()
        now = self.clock()
        in_time = now <= began + deadline + LATE
        lasting = any(outage.end - outage.start >= deadline and outage.end >= began for outage in self._all)
        return lasting and in_time and right_code(error)


def right_code(error: Exception) -> bool:
    """What a caller may be told when nobody is there."""
    return isinstance(error, (UnavailableError, DeadlineError))
