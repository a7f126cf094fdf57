"""The block pool: which KV blocks are free, in use or kept for their contents. Torch-free; it moves numbers, never KV.

The life of a block:
    free ----allocate----> in use (references >= 1) ----release----> free
                             | register(hash)            |
                             v                           v (registered)
                           in use, in the index ---> evictable (LRU) --match/acquire--> in use
                                                        |
                                                        +--allocate evicts it--> in use, generation bumped
Every `allocate` bumps the generation of each block it hands out, before it hands it out: whoever read the block for its
former owner compares generations afterwards and knows that what it read may be rubbish. Generations may live in shared
memory.

One thread owns a pool (the engine's); nothing here locks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.errors import InternalError, OverloadedError

_GENERATION_MASK = (1 << 64) - 1


class PoolExhaustedError(OverloadedError):
    """Not enough free blocks now; nothing was allocated."""

    default_reason = "KV_BLOCKS_EXHAUSTED"


class IntegrityError(AssertionError):
    """The pool's books contradict each other: our own bug."""


class Generations(Protocol):
    """One counter per block: a list, an array, or a memoryview cast to "Q" over shared memory."""

    def __getitem__(self, index: int, /) -> int:
        """The counter of a block."""
        ...

    def __setitem__(self, index: int, value: int, /) -> None:
        """Writes the counter of a block."""
        ...

    def __len__(self) -> int:
        """Number of counters."""
        ...


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A snapshot. Blocks: total = in_use + free + evictable. The last three count since the start."""

    total: int
    in_use: int
    free: int
    evictable: int
    cached: int
    queried_blocks: int
    hit_blocks: int
    evictions: int


class BlockPool:
    """Reference-counted blocks with a prefix index. Block ids are 0 .. num_blocks-1."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_cache: bool = True,
        generations: Generations | None = None,
    ) -> None:
        """`generations` (one per block) is written in place; None: a private list of zeros. Sizes in blocks and
        tokens."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token, got {num_blocks} of {block_size}")
        if generations is not None and len(generations) != num_blocks:
            raise ValueError(f"{len(generations)} generations for {num_blocks} blocks")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._generations: Generations = [0] * num_blocks if generations is None else generations
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is the warmest
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._queried = self._hits = self._evictions = 0

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out now: free ones and evictable ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix index, in use or evictable."""
        return len(self._block_of)

    @property
    def stats(self) -> PoolStats:
        """Counts of now, for metrics."""
        return PoolStats(
            total=self.num_blocks,
            in_use=self.num_blocks - self.num_free,
            free=len(self._free),
            evictable=len(self._evictable),
            cached=self.num_cached,
            queried_blocks=self._queried,
            hit_blocks=self._hits,
            evictions=self._evictions,
        )

    def can_allocate(self, count: int) -> bool:
        """True when `allocate(count)` would succeed."""
        return count <= self.num_free

    def allocate(self, count: int) -> list[int]:
        """`count` private blocks with one reference each and new generations; evicts the least recently used if need
        be.

        Raises PoolExhaustedError, and then has changed nothing.
        """
        if count < 0:
            raise InternalError(f"allocate({count})")
        if not self.can_allocate(count):
            raise PoolExhaustedError(f"{count} KV blocks wanted, {self.num_free} of {self.num_blocks} free")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        block = self._free.pop() if self._free else self._evict()
        self._generations[block] = (self._generations[block] + 1) & _GENERATION_MASK
        self._refs[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        self._evictions += 1
        return block

    def acquire(self, blocks: Sequence[int]) -> None:
        """One more reference to each. They must be in use or in the index: a free block has no contents to share."""
        for block in blocks:
            if self._refs[block] == 0:
                if block not in self._evictable:
                    raise InternalError(f"block {block} is free and can't be acquired")
                del self._evictable[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each, last block first, so that a sequence's tail is evicted before its head.

        A block without references becomes evictable when it is in the index, else free.
        """
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise InternalError(f"block {block} released more often than acquired")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if block in self._hash_of:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of `hashes`, ACQUIRED for the caller, who releases them."""
        blocks = self._lookup(hashes)
        self._queried += len(hashes)
        self._hits += len(blocks)
        self.acquire(blocks)
        return blocks

    def peek(self, hashes: Sequence[bytes]) -> int:
        """How many blocks `match` would find. No side effect, not even on the LRU order."""
        return len(self._lookup(hashes))

    def _lookup(self, hashes: Sequence[bytes]) -> list[int]:
        blocks: list[int] = []
        for name in hashes:
            block = self._block_of.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def register(self, block: int, name: bytes) -> None:
        """Publish a full, computed block that the caller holds under its hash. The first block of a name keeps it.

        Does nothing when the prefix cache is off. A block never changes its name (InternalError).
        """
        if not self.prefix_cache:
            return
        if self._refs[block] == 0:
            raise InternalError(f"block {block} is registered by nobody who holds it")
        known = self._hash_of.get(block)
        if known is not None:
            if known != name:
                raise InternalError(f"block {block} is registered under another hash")
            return
        if name not in self._block_of:
            self._block_of[name] = block
            self._hash_of[block] = name

    def ref_count(self, block: int) -> int:
        """References to a block; 0 when free or evictable."""
        return self._refs[block]

    def generation(self, block: int) -> int:
        """How often the block was handed out, modulo 2^64."""
        return self._generations[block]

    def is_shared(self, block: int) -> bool:
        """True when writing into the block would change what another reader sees: more than one reference, or
        published."""
        return self._refs[block] > 1 or block in self._hash_of

    def reset_prefix_cache(self) -> None:
        """Forget all names. Evictable blocks become free; blocks in use stay with their holders."""
        self._free.extend(reversed(self._evictable))
        self._evictable.clear()
        self._hash_of.clear()
        self._block_of.clear()

    def check_integrity(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Raises IntegrityError unless every block is in exactly one state and the index is one to one.

        `holders`, when given, are the block lists of everyone who holds references: the counts must agree exactly.
        Costs O(num_blocks); for tests and idle times.
        """
        free, evictable = set(self._free), set(self._evictable)
        used = {block for block, refs in enumerate(self._refs) if refs > 0}
        if len(free) != len(self._free):
            raise IntegrityError("a block is in the free list twice")
        if any(refs < 0 for refs in self._refs):
            raise IntegrityError("a reference count is negative")
        if alien := sorted((free | evictable | self._hash_of.keys()) - set(range(self.num_blocks))):
            raise IntegrityError(f"blocks that the pool doesn't have: {alien}")
        if free & evictable or free & used or evictable & used:
            raise IntegrityError(f"blocks in two states: {sorted(free & evictable | free & used | evictable & used)}")
        if lost := set(range(self.num_blocks)) - free - evictable - used:
            raise IntegrityError(f"lost blocks: {sorted(lost)}")
        self._check_index(free, evictable)
        if holders is not None:
            self._check_holders(holders)

    def _check_index(self, free: set[int], evictable: set[int]) -> None:
        if {name: block for block, name in self._hash_of.items()} != self._block_of:
            raise IntegrityError("the index and the blocks' names differ")
        if named := free & self._hash_of.keys():
            raise IntegrityError(f"free blocks in the index: {sorted(named)}")
        if nameless := evictable - self._hash_of.keys():
            raise IntegrityError(f"evictable blocks without a name: {sorted(nameless)}")
        if self._hash_of and not self.prefix_cache:
            raise IntegrityError("names although the prefix cache is off")

    def _check_holders(self, holders: Iterable[Sequence[int]]) -> None:
        counts = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                if not 0 <= block < self.num_blocks:
                    raise IntegrityError(f"somebody holds block {block} of {self.num_blocks}")
                counts[block] += 1
        if counts != self._refs:
            wrong = {b: (self._refs[b], counts[b]) for b in range(self.num_blocks) if counts[b] != self._refs[b]}
            raise IntegrityError(f"block: (references counted, references held): {wrong}")
