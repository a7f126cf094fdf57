"""What every scheduler tells and counts. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import TandemError


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing more is computed for the request."""

    key: str
    error: TandemError


@dataclass(slots=True)
class Counters:
    """Counts since the start, in tokens or requests."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    cancelled: int = 0
    """Requests that ended before they were done."""
    steps_after_cancel: int = 0
    """Steps launched with a request aboard whose end had been posted before."""
    worst_steps_after_cancel: int = 0
    """The most of these for one request."""

    def count_cancel(self, last_step: int, posted_step: int) -> None:
        """A request ended that took part in `last_step` last; its end was posted when `posted_step` was the last."""
        late = max(0, last_step - posted_step)
        self.cancelled += 1
        self.steps_after_cancel += late
        self.worst_steps_after_cancel = max(self.worst_steps_after_cancel, late)
