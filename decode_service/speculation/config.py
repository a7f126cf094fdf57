"""How a worker speculates, resolved. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from decode_service.speculation.proposer import Proposer

DEFAULT_TOKENS = 15
"""Drafts of one output in a step: with the token before them they fill a tile of 16 rows."""
MAX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """`proposers` in order of preference; none: no speculation."""

    proposers: Sequence[Proposer] = ()
    max_tokens: int = DEFAULT_TOKENS
    """Most drafts of one output in a step."""
    fixed: bool = False
    """Verify every draft at its full length, whatever that costs."""
