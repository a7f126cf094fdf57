"""What the scheduler must know of its engine, as plain numbers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from worker.limits import EngineLimits

RECEIVING_SHARE = 0.3
"""Most of the pool that may wait for a transfer at once; one request may always receive."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig(EngineLimits):
    """Limits of one decode scheduler.

    `max_step_tokens` bounds local prefill in a step in which nobody decodes, and a step with its drafts;
    `max_sequences` counts the outputs aboard, all requests together.
    """

    mixed_prefill_tokens: int = 64
    """Prompt tokens of local prefill in a step beside decoding sequences: what a running stream may be held up by."""
    max_drafts: int | None = None
    """Drafts in a step, all outputs together; None: as many as `max_step_tokens` leaves rows for."""

    def __post_init__(self) -> None:
        """Fail at start, with the key's name."""
        EngineLimits.__post_init__(self)
        self.check_positive("mixed_prefill_tokens")
