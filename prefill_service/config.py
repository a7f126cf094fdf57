"""What the scheduler must know of its engine, as plain numbers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import ConfigError
from worker.limits import EngineLimits

MOST_PRIORITY = 100
"""Priorities count within -100 .. 100, so that none outweighs waiting for ever."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig(EngineLimits):
    """Limits of one prefill scheduler; `max_sequences` is how many requests may be prefilling at once."""

    max_waiting: int = 1024
    """Most requests that may wait; more are refused."""
    aging_seconds: float = 5.0
    """Waiting so long makes up for one step of priority."""

    def __post_init__(self) -> None:
        """Fail at start, with the key's name."""
        EngineLimits.__post_init__(self)
        self.check_positive("max_waiting")
        if not self.aging_seconds > 0:
            raise ConfigError(f"aging_seconds: must be above 0, got {self.aging_seconds}")
