"""What every scheduler must know of its engine, as plain numbers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits and identity of one engine. Raises ConfigError for a limit below 1."""

    max_step_tokens: int
    """Prompt tokens of one step, all requests together: the chunk size."""
    max_sequences: int
    """Most sequences that may be computed at once."""
    max_context: int
    """Most tokens of prompt and output together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    model_id: str = ""
    layout_id: str = ""
    numerics_id: str = ""

    def __post_init__(self) -> None:
        """Fail at start, with the key's name."""
        self.check_positive("max_step_tokens", "max_sequences", "max_context", "vocab_size")

    def check_positive(self, *keys: str) -> None:
        """Raises ConfigError for the first that is below 1."""
        for key in keys:
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: must be at least 1, got {getattr(self, key)}")
