"""Random mixes of everything that sequences do with blocks, checked after every step.

The machine keeps what a device would keep: the tokens (with all that came before them) last written to each slot. So
it sees not only lost and doubled blocks, but also a write into a block that somebody else reads, and a copy that
comes too late.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_pool import BlockPool, PoolExhaustedError
from engine.block_table import BlockTable
from engine.prefix import block_hashes, prefix_root

ROOT = prefix_root("t", "c", "m", "l", "n")
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


@dataclass
class Sequence:
    """A live sequence: its table and the tokens that are computed."""

    table: BlockTable
    tokens: list[int] = field(default_factory=list)


class BlockMachine(RuleBasedStateMachine):
    """A few sequences over a small pool, with two different tokens so that prefixes meet."""

    @initialize(blocks=st.integers(1, 12), size=st.integers(1, 4), cache=st.booleans())
    def start(self, blocks: int, size: int, cache: bool) -> None:
        self.generations = [7] * blocks
        self.pool = BlockPool(blocks, size, prefix_cache=cache, generations=self.generations)
        self.size = size
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.sequences: list[Sequence] = []
        self.names: dict[bytes, tuple[int, ...]] = {}

    def hashes(self, tokens: list[int]) -> list[bytes]:
        names = block_hashes(ROOT, tokens, self.size)
        self.names.update((name, tuple(tokens[: (i + 1) * self.size])) for i, name in enumerate(names))
        return names

    def compute(self, sequence: Sequence, tokens: list[int], start: int) -> bool:
        """One step: tokens from `start` on are (re)computed; False when there is no room."""
        table, before = sequence.table, list(sequence.table.blocks)
        free, marks = self.pool.num_free, list(self.generations)
        needed = table.blocks_needed(len(tokens), start)
        try:
            copies = table.ensure(len(tokens), start)
        except PoolExhaustedError:
            assert needed > free
            assert table.blocks == before
            assert marks == self.generations
            return False
        fresh = set(table.blocks) - set(before)
        assert len(fresh) == needed
        assert all(self.generations[block] == marks[block] + (block in fresh) for block in range(len(marks)))
        for source, destination in copies:
            for offset in range(self.size):
                self.slots[destination, offset] = self.slots.get((source, offset), ())
        for position in range(start, len(tokens)):
            block = table.blocks[position // self.size]
            assert not self.pool.is_shared(block)
            self.slots[block, position % self.size] = tuple(tokens[: position + 1])
        sequence.tokens = tokens
        return True

    @rule(tokens=TOKENS)
    def begin(self, tokens: list[int]) -> None:
        """A prompt: what is cached is adopted, the last token is always computed."""
        sequence = Sequence(BlockTable(self.pool))
        hashes = self.hashes(tokens)
        expected = self.pool.peek(hashes)
        matched = self.pool.match(hashes)
        assert len(matched) == expected
        sequence.table.adopt(matched)
        assert sequence.table.num_tokens == len(matched) * self.size
        if self.compute(sequence, tokens, min(len(matched) * self.size, len(tokens) - 1)):
            self.sequences.append(sequence)
        else:
            sequence.table.free()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), more=TOKENS)
    def extend(self, data: st.DataObject, more: list[int]) -> None:
        """Decode steps. When there is no room the sequence is preempted."""
        sequence = data.draw(st.sampled_from(self.sequences))
        if not self.compute(sequence, sequence.tokens + more, len(sequence.tokens)):
            sequence.table.free()
            self.sequences.remove(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self.sequences))
        self.sequences.append(Sequence(parent.table.fork(), list(parent.tokens)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        computed = data.draw(st.integers(0, len(sequence.tokens)))
        sequence.table.register_full(self.hashes(sequence.tokens), computed)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        sequence.table.free()
        sequence.table.free()  # nothing left to give back
        self.sequences.remove(sequence)

    @rule()
    def reset(self) -> None:
        self.pool.reset_prefix_cache()
        assert self.pool.num_cached == 0

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity([sequence.table.held for sequence in self.sequences])

    @invariant()
    def everyone_reads_their_own(self) -> None:
        if not hasattr(self, "pool"):
            return
        for sequence in self.sequences:
            for position in range(len(sequence.tokens)):
                slot = sequence.table.blocks[position // self.size], position % self.size
                assert self.slots[slot] == tuple(sequence.tokens[: position + 1])

    @invariant()
    def cached_blocks_hold_what_their_names_say(self) -> None:
        if not hasattr(self, "pool"):
            return
        for name, block in self.pool._block_of.items():
            tokens = self.names[name]
            for offset in range(self.size):
                assert self.slots[block, offset] == tokens[: len(tokens) - self.size + offset + 1]

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for sequence in self.sequences:
                sequence.table.free()
            assert self.pool.num_free == self.pool.num_blocks
            self.pool.check_integrity([])


BlockMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_block_machine = BlockMachine.TestCase
