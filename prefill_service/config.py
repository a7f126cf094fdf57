"""What the scheduler must know of its engine, as plain numbers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import ConfigError

MOST_PRIORITY = 100
"""Priorities count within -100 .. 100, so that none outweighs waiting for ever."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and identity of one prefill scheduler. Raises ConfigError for a limit below 1."""

    max_step_tokens: int
    """Prompt tokens of one step, all requests together: the chunk size."""
    max_sequences: int
    """Most requests that may be prefilling at once."""
    max_context: int
    """Most tokens of prompt and output together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    max_waiting: int = 1024
    """Most requests that may wait; more are refused."""
    aging_seconds: float = 5.0
    """Waiting so long makes up for one step of priority."""
    model_id: str = ""
    layout_id: str = ""
    numerics_id: str = ""

    def __post_init__(self) -> None:
        """Fail at start, with the key's name."""
        for key in ("max_step_tokens", "max_sequences", "max_context", "vocab_size", "max_waiting"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: must be at least 1, got {getattr(self, key)}")
        if not self.aging_seconds > 0:
            raise ConfigError(f"aging_seconds: must be above 0, got {self.aging_seconds}")
