"""One sequence's blocks. Torch-free.

The life of a table: `adopt` blocks of a cached prefix (or none) -> `ensure` before every step that writes, maybe
`extend` for drafts -> after the step `trim` to what of them stands, `register_full` for completed blocks -> `fork` for
each further output of the prompt -> `free` once, when the sequence is over and no launched step names its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.block_pool import BlockPool


class BlockTable:
    """Holds one reference to each block in `blocks`. Position p lies in block p // block_size at offset p %
    block_size."""

    __slots__ = ("_pool", "_registered", "_sources", "blocks", "num_tokens")

    def __init__(self, pool: BlockPool) -> None:
        """An empty table."""
        self._pool = pool
        self._registered = 0
        self._sources: list[int] = []
        self.blocks: list[int] = []
        """Block ids in order; pass it to `Slice.block_table`, don't change it."""
        self.num_tokens = 0
        """Positions 0 .. num_tokens-1 have been promised a slot by `adopt` and `ensure`."""

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def held(self) -> list[int]:
        """Every reference this table has, for `BlockPool.check_integrity`: its blocks, and sources of copies not yet
        settled."""
        return self.blocks + self._sources

    def adopt(self, blocks: Sequence[int]) -> None:
        """Take over references that the caller has (from `BlockPool.match` or `allocate`), behind the blocks so far.

        The blocks are taken to hold computed tokens in full: `num_tokens` grows to cover them.
        """
        self.blocks.extend(blocks)
        self.num_tokens = len(self.blocks) * self._pool.block_size

    def blocks_needed(self, num_tokens: int, start: int | None = None) -> int:
        """How many blocks `ensure` would allocate, for growth and for private copies."""
        return self._growth(num_tokens) + len(self._shared_places(num_tokens, start))

    def _has_place(self, start: int, num_tokens: int) -> bool:
        """True when positions start .. num_tokens-1 lie in one private block that is there, as in most decode steps."""
        place = start // self._pool.block_size
        here = place == (num_tokens - 1) // self._pool.block_size and place < len(self.blocks)
        return here and not self._pool.is_shared(self.blocks[place])

    def _growth(self, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self._pool.block_size) - len(self.blocks))

    def ensure(self, num_tokens: int, start: int | None = None) -> list[tuple[int, int]]:
        """Make positions start .. num_tokens-1 writable: grow, and replace blocks that others also see by private ones.

        `start` defaults to `num_tokens` as the last call left it (what is behind was written already). Returns (source,
        destination) pairs for `Batch.copies` of the very step that does the writing; a scheduler that drops the
        sequence from that step drops its pairs too. Raises PoolExhaustedError, and then has changed nothing but settled
        sources.
        """
        self.settle()
        if start is not None and self._has_place(start, num_tokens):
            self.num_tokens = max(self.num_tokens, num_tokens)
            return []
        shared = self._shared_places(num_tokens, start)
        fresh = self._pool.allocate(self._growth(num_tokens) + len(shared))
        copies: list[tuple[int, int]] = []
        for place in shared:
            source, destination = self.blocks[place], fresh.pop()
            self.blocks[place] = destination
            self._registered = min(self._registered, place)
            self._sources.append(source)
            copies.append((source, destination))
        self.blocks.extend(fresh)
        self.num_tokens = max(self.num_tokens, num_tokens)
        return copies

    def extend(self, num_tokens: int) -> bool:
        """After `ensure` for the same step: room for drafts, or for the next step's token, up to position num_tokens-1,
        in private blocks that are free now. False: there is none, and nothing has changed.
        """
        if self._shared_places(num_tokens, self.num_tokens):
            return False
        needed = self.blocks_needed(num_tokens)
        if not self._pool.can_allocate(needed):
            return False
        self.blocks.extend(self._pool.allocate(needed))
        self.num_tokens = max(self.num_tokens, num_tokens)
        return True

    def trim(self, num_tokens: int) -> None:
        """Take back promised positions from `num_tokens` on: what was written there counts no more, and blocks behind
        are given back. Only positions that were never computed for good, so that no published block is among them.
        """
        keep = -(-num_tokens // self._pool.block_size)
        self._pool.release(self.blocks[keep:])
        del self.blocks[keep:]
        self.num_tokens = min(self.num_tokens, num_tokens)

    def _shared_places(self, num_tokens: int, start: int | None) -> list[int]:
        """Places in `blocks` that will be written but aren't private."""
        first = self.num_tokens if start is None else start
        if first >= num_tokens:
            return []
        size = self._pool.block_size
        end = min(-(-num_tokens // size), len(self.blocks))
        return [place for place in range(first // size, end) if self._pool.is_shared(self.blocks[place])]

    def settle(self) -> None:
        """Release the sources of the last `ensure`'s copies: the step is over. `ensure`, `register_full`, `free` do it
        too.

        Until then they are held: a block may get a new owner only after the last launched step that names it.
        """
        if self._sources:
            self._pool.release(self._sources)
            self._sources = []

    def fork(self) -> BlockTable:
        """Another table over the same blocks (one more reference each); the first to write into one copies it."""
        child = BlockTable(self._pool)
        self._pool.acquire(self.blocks)
        child.blocks = list(self.blocks)
        child.num_tokens = self.num_tokens
        child._registered = self._registered
        return child

    def register_full(self, hashes: Sequence[bytes], computed_tokens: int) -> None:
        """Publish the blocks that are full of computed tokens and have a hash. Only looks at blocks it hasn't
        published."""
        self.settle()
        full = min(computed_tokens // self._pool.block_size, len(hashes), len(self.blocks))
        for place in range(self._registered, full):
            self._pool.register(self.blocks[place], hashes[place])
        self._registered = max(self._registered, full)

    def free(self) -> None:
        """Give back every block. The table is empty afterwards and may be used again (preemption)."""
        self.settle()
        self._pool.release(self.blocks)
        self.blocks = []
        self.num_tokens = 0
        self._registered = 0
