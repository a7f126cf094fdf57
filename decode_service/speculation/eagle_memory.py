"""The KV of an EAGLE head: as a draft model's, but begun where the target's features begin. Torch-free.

The head's rows are one token ahead of the features beside them (`engine.eagle_runner`): the row at position p has the
token at p + 1. Features are there of tokens that this worker computed, and of the latest only; so what a prefill worker
computed the head never sees, and it starts with the first token that is computed here.
"""

from __future__ import annotations

from typing import Protocol

from decode_service.speculation.draft_memory import DraftSequence, OwnMemory
from decode_service.speculation.proposer import Ask, OutputKey
from engine.block_pool import BlockPool
from engine.block_table import BlockTable


class Features(Protocol):
    """`engine.features.FeatureStore`, as far as it counts here."""

    def trim(self, request: str, output: int, end: int) -> tuple[int, int]:
        """Only rows below position `end` count. The positions that are there, as (first, behind the last)."""
        ...


class Head(Protocol):
    """`engine.eagle_runner.EagleRunner`, as far as it counts here."""

    def place(self, request: str, output: int, origin: int) -> None:
        """An output's rows begin at position `origin`."""
        ...

    def forget(self, request: str, output: int) -> None:
        """The output has left."""
        ...


class EagleMemory(OwnMemory):
    """The blocks of one pool, by output."""

    def __init__(self, pool: BlockPool, features: Features, head: Head) -> None:
        """The pool must be this object's alone, and without a prefix cache: KV here depends on features."""
        super().__init__(pool)
        self._features, self._head = features, head

    def of(self, ask: Ask) -> DraftSequence | None:
        """See `DraftMemory`. Rows that were computed with the head's own results, for drafts, are computed again."""
        known = len(ask.prompt) + len(ask.output) - 1
        base, end = self._features.trim(*ask.key, known)
        if not base < end == known:
            return None
        if (sequence := self._sequences.get(ask.key)) is not None:
            del sequence.tokens[sequence.true :]
            if sequence.first - 1 + sequence.true < base:  # features between were forgotten
                self.drop(ask.key)
        if ask.key not in self._sequences:
            self._head.place(*ask.key, base)
        return super().of(ask)

    def forget(self, key: OutputKey) -> None:
        """See `DraftMemory`."""
        self.drop(key)
        self._head.forget(*key)

    def _new(self, ask: Ask) -> DraftSequence:
        base, _ = self._features.trim(*ask.key, len(ask.prompt) + len(ask.output) - 1)
        return DraftSequence(BlockTable(self._pool), [], first=base + 1)
