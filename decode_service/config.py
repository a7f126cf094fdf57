"""What the scheduler must know of its engine, as plain numbers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import ConfigError

RECEIVING_SHARE = 0.3
"""Most of the pool that may wait for a transfer at once; one request may always receive."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and identity of one decode scheduler. Raises ConfigError for a limit below 1."""

    max_step_tokens: int
    """Prompt tokens of local prefill in a step in which nobody decodes."""
    max_sequences: int
    """Most outputs that may be aboard at once, all requests together."""
    max_context: int
    """Most tokens of prompt and output together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    mixed_prefill_tokens: int = 64
    """Prompt tokens of local prefill in a step beside decoding sequences: what a running stream may be held up by."""
    model_id: str = ""
    layout_id: str = ""
    numerics_id: str = ""

    def __post_init__(self) -> None:
        """Fail at start, with the key's name."""
        for key in ("max_step_tokens", "max_sequences", "max_context", "vocab_size", "mixed_prefill_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: must be at least 1, got {getattr(self, key)}")
