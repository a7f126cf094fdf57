"""Whether a worker that fails request after request gets new ones.

Life cycle of a `Breaker`: closed -> `eject_after` failures in a row, and `open()`: nothing new for a while -> the while
is over (half open): one request at a time tries it -> a success closes it, a failure opens it for twice as long.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

JITTER = 0.2


@dataclass(frozen=True)
class Ejecting:
    """When a worker gets nothing new for a while, and for how many seconds."""

    after: int = 5
    """Failures in a row; 0: never."""
    first: float = 1.0
    most: float = 20.0
    """Less than a request waits where no worker is left."""


class Breaker:
    """Of one incarnation of a worker."""

    def __init__(
        self, ejecting: Ejecting, clock: Callable[[], float], draw: Callable[[], float] = random.random
    ) -> None:
        """Closed. `clock` in seconds, `draw` gives numbers in [0, 1)."""
        self._ejecting, self._clock, self._draw = ejecting, clock, draw
        self._failures = self._times = 0
        self._until: float | None = None
        self._trying = False

    @property
    def closed(self) -> bool:
        """All is well, as far as is known."""
        return self._until is None

    @property
    def _half_open(self) -> bool:
        return self._until is not None and self._clock() >= self._until

    @property
    def ready(self) -> bool:
        """A new request may go there."""
        return self.closed or (self._half_open and not self._trying)

    def taken(self) -> None:
        """A request goes there."""
        self._trying = self._half_open

    def given(self) -> None:
        """It is over, or far enough: the next may try."""
        self._trying = False

    def failed(self) -> bool:
        """One more failure. True when it is time to `open`."""
        self._failures += 1
        self._trying = False
        if self.closed:
            return 0 < self._ejecting.after <= self._failures
        return self._half_open  # requests that went there before it opened say nothing new

    def succeeded(self) -> bool:
        """A request went well. True when that closes it."""
        if not self.closed and not self._half_open:
            return False
        was_closed = self.closed
        self.close()
        return not was_closed

    def open(self) -> float:
        """Nothing new from now on; returns for how many seconds."""
        seconds = min(self._ejecting.most, self._ejecting.first * 2.0 ** min(self._times, 16))
        seconds *= 1 + JITTER * (2 * self._draw() - 1)
        self._times += 1
        self._until, self._trying = self._clock() + seconds, False
        return seconds

    def close(self) -> None:
        """Nothing that happened counts any more."""
        self._failures = self._times = 0
        self._until, self._trying = None, False

    def take_back(self) -> None:
        """It is needed, well or not: the next failure opens it again if it isn't needed then."""
        self._until, self._trying = None, False
        self._failures = max(0, self._ejecting.after - 1)
