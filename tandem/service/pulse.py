"""Whether an engine thread lives, and whether its books are right: what both kinds of worker tell of their engine.

Life cycle of a `Pulse`: made with the engine loop -> `turn()` after every turn, `with step():` around the runner ->
`beating` is read by whoever sends heartbeats, from any thread.

A step says nothing while it runs, and on a slow or loaded machine a chunk of a prompt takes longer than a watcher waits
for a heartbeat. So heartbeats go out during a step as well, until it has run longer than any step may. What happens
between two steps is quick, so a loop that hangs there is found sooner.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from tandem.service.logging import get_logger

_log = get_logger(__name__)
TURN_SECONDS = 5.0
"""A loop that is not in a step and hasn't turned for so long hangs. An idle one turns every half second."""
STEP_SECONDS = 30.0
"""A step that has run for so long hangs."""
CHECK_SECONDS = 1.0
"""Least seconds between two integrity checks."""


class Pulse:
    """Written by the engine thread only."""

    def __init__(self) -> None:
        """Counts as a turn."""
        self._mark = (time.monotonic(), False)  # one tuple: readers on other threads never see half a change

    def turn(self) -> None:
        """The loop turned."""
        self._mark = (time.monotonic(), False)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one step of the runner."""
        self._mark = (time.monotonic(), True)
        try:
            yield
        finally:
            self.turn()

    @property
    def beating(self) -> bool:
        """False when the loop hangs, in a step or between two."""
        since, stepping = self._mark
        return time.monotonic() - since < (STEP_SECONDS if stepping else TURN_SECONDS)


class IdleCheck:
    """Runs a check of the books when there is nothing else to do and something has changed since the last one."""

    def __init__(self, check: Callable[[], None], report: Callable[[bool], None] | None = None) -> None:
        """`check` raises when the books are wrong; `report` is told after each whether they were right."""
        self._check, self._report = check, report
        self._changed = False
        self._checked = float("-inf")

    def changed(self) -> None:
        """Something was done."""
        self._changed = True

    def idle(self) -> None:
        """There is nothing to do: check now, unless that was done a moment ago."""
        if not self._changed or time.monotonic() - self._checked < CHECK_SECONDS:
            return
        self._changed = False
        right = True
        try:
            self._check()
        except Exception as exc:  # our own bug, which must be seen and not take the service down
            right = False
            _log.error("integrity check failed", exc_info=exc)
        self._checked = time.monotonic()
        if self._report is not None:
            self._report(right)
