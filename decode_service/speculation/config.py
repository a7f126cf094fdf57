"""How a worker speculates, resolved. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from decode_service.speculation.proposer import Proposer
from engine.block_pool import BlockPool

DEFAULT_TOKENS = 15
"""Drafts of one output in a step: with the token before them they fill a tile of 16 rows."""
MAX_TOKENS = 64


class Borrower(Protocol):
    """Who reads the target's KV."""

    def borrow(self, pool: BlockPool) -> None:
        """The pool of `Ask.blocks`, before the first call; for use inside `propose` only."""
        ...


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """`proposers` in order of preference; none: no speculation."""

    proposers: Sequence[Proposer] = ()
    max_tokens: int = DEFAULT_TOKENS
    """Most drafts of one output in a step."""
    fixed: bool = False
    """Ask for drafts and verify them at their full length, whatever that costs."""
    models: Sequence[str] = ()
    """Proposers that need a model, by name: they come once the engine is loaded (`model_proposers`)."""
    borrowers: Sequence[Borrower] = ()
    """Who wants to know of the scheduler's pool."""
