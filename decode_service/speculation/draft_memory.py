"""The KV that drafting models read and write: blocks of a pool of their own, or the target's. Torch-free.

`OwnMemory` is for a draft model. Life cycle of an output's KV: `of` (blocks of a cached prompt, or none) -> `grow`
before each step that writes -> `register` once its prompt is computed -> `drop`, when the output has ended, or when
another needs the blocks and this one asked least recently. It is a hint: an output that lost it begins anew.

`BorrowedMemory` is for the target with layers skipped, which reads what the target has cached. Life cycle: `of` (the
target's blocks, shared) -> `grow` (those that would be written are copied first, and new ones come behind) -> `end`,
which gives everything back: between two calls nothing is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from decode_service.speculation.proposer import Ask, OutputKey
from engine.block_pool import BlockPool, PoolExhaustedError
from engine.block_table import BlockTable
from engine.prefix import block_hashes, prefix_root


@dataclass(slots=True, eq=False)
class DraftSequence:
    """What is computed of one output."""

    table: BlockTable
    hashes: list[bytes]
    """Names of the prompt's full blocks."""
    tokens: list[int] = field(default_factory=list)
    """Ids whose KV is there: known ones, then drafts that may turn out wrong."""
    true: int = 0
    """How many of them are known ones."""
    first: int = 0
    """Which of the output's tokens, prompt included, is the first of them."""


class DraftMemory(Protocol):
    """What a proposer wants of either, in one call: `begin`, then `of` and `grow` for each ask, then `end`."""

    def begin(self, asks: Sequence[Ask]) -> None:
        """A call begins; what it asks for is safe until its end."""
        ...

    def of(self, ask: Ask) -> DraftSequence | None:
        """What is computed of an output; None: there can be no draft for it now."""
        ...

    def grow(self, sequence: DraftSequence, tokens: int) -> list[tuple[int, int]] | None:
        """Make room for `tokens` tokens in all; None: there is none. Returns the copies that must come before."""
        ...

    def register(self, sequence: DraftSequence, prompt: int) -> None:
        """More of an output's known tokens is computed; the first `prompt` are its prompt's."""
        ...

    def drop(self, key: OutputKey) -> None:
        """Give back an output's blocks. Unknown keys are ignored."""
        ...

    def forget(self, key: OutputKey) -> None:
        """The output has left. Unknown keys are ignored."""
        ...

    def end(self) -> None:
        """The call is over, whatever came of it."""
        ...


class OwnMemory:
    """The blocks of one pool, by output."""

    def __init__(self, pool: BlockPool) -> None:
        """The pool must be this object's alone."""
        self._pool = pool
        self._sequences: dict[OutputKey, DraftSequence] = {}  # those that asked least recently first
        self._asking: set[OutputKey] = set()

    def __len__(self) -> int:
        """Outputs that hold blocks."""
        return len(self._sequences)

    def begin(self, asks: Sequence[Ask]) -> None:
        """See `DraftMemory`: none of these loses its blocks to another before the next call."""
        self._asking = {ask.key for ask in asks}

    def of(self, ask: Ask) -> DraftSequence | None:
        """What is there of an output. A new one begins with what other outputs of its scope left of its prompt."""
        sequence = self._sequences.pop(ask.key, None) or self._new(ask)
        self._sequences[ask.key] = sequence
        return sequence

    def grow(self, sequence: DraftSequence, tokens: int) -> list[tuple[int, int]] | None:
        """See `DraftMemory`. Takes the blocks of outputs that don't ask, those that asked least recently first."""
        while True:
            try:
                return sequence.table.ensure(tokens, start=len(sequence.tokens))
            except PoolExhaustedError:
                idle = next((key for key in self._sequences if key not in self._asking), None)
                if idle is None:
                    return None
                self.drop(idle)

    def register(self, sequence: DraftSequence, prompt: int) -> None:
        """Let outputs of the same scope find what is computed of the first `prompt` tokens."""
        sequence.table.register_full(sequence.hashes, min(sequence.true, prompt))

    def drop(self, key: OutputKey) -> None:
        """See `DraftMemory`."""
        if (sequence := self._sequences.pop(key, None)) is not None:
            sequence.table.free()

    def forget(self, key: OutputKey) -> None:
        """See `DraftMemory`."""
        self.drop(key)

    def end(self) -> None:
        """Nothing: the blocks stay."""

    def check_integrity(self) -> None:
        """Raises IntegrityError unless the pool's references are exactly those held."""
        self._pool.check_integrity(sequence.table.held for sequence in self._sequences.values())

    def _new(self, ask: Ask) -> DraftSequence:
        size, prompt = self._pool.block_size, ask.prompt
        # One pool serves one model in one process: the scope alone tells names apart.
        hashes = block_hashes(prefix_root("", ask.scope, "", "", ""), prompt, size) if self._pool.prefix_cache else []
        matched = self._pool.match(hashes)
        table = BlockTable(self._pool)
        table.adopt(matched)
        known = list(prompt[: len(matched) * size])
        return DraftSequence(table, hashes, known, len(known))


class BorrowedMemory:
    """The target's own blocks and pool. Its outputs' last, partly filled blocks are copied before a draft is written.

    Where such a block is itself a copy that the target's next step makes, its contents aren't there yet: that one draft
    is a poor one.
    """

    def __init__(self) -> None:
        """Of no use until `borrow`."""
        self._sequences: dict[OutputKey, DraftSequence] = {}

    def borrow(self, pool: BlockPool) -> None:
        """The scheduler's pool; used inside a call only."""
        self._pool = pool

    def begin(self, asks: Sequence[Ask]) -> None:
        """See `DraftMemory`."""
        self.end()

    def of(self, ask: Ask) -> DraftSequence:
        """All but the last known token are in the target's blocks."""
        known = [*ask.prompt, *ask.output][:-1]
        blocks = list(ask.blocks[: -(-len(known) // self._pool.block_size)])
        self._pool.acquire(blocks)
        table = BlockTable(self._pool)
        table.adopt(blocks)
        sequence = self._sequences[ask.key] = DraftSequence(table, [], known, len(known))
        return sequence

    def grow(self, sequence: DraftSequence, tokens: int) -> list[tuple[int, int]] | None:
        """See `DraftMemory`. Nobody gives up a block for a draft."""
        try:
            return sequence.table.ensure(tokens, start=len(sequence.tokens))
        except PoolExhaustedError:
            return None

    def register(self, sequence: DraftSequence, prompt: int) -> None:
        """Nothing: what a skipping model computes is nobody else's."""

    def drop(self, key: OutputKey) -> None:
        """See `DraftMemory`."""
        if (sequence := self._sequences.pop(key, None)) is not None:
            sequence.table.free()

    def forget(self, key: OutputKey) -> None:
        """Nothing: between calls nothing is held."""

    def end(self) -> None:
        """Give everything back."""
        for key in list(self._sequences):
            self.drop(key)
