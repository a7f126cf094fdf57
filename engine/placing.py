"""Where the rows of a step lie, as numpy arrays: what every device's step is made of. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from engine.batch import Slice
from tandem.errors import InternalError

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Placing:
    """T rows of S sequences, one sequence after another; see `engine.models.meta.ForwardMeta`."""

    token_ids: Longs
    positions: Longs
    slots: Longs
    block_tables: Ints
    """[S, B], padded with 0 on the right."""
    query_starts: Ints
    """[S + 1]."""
    context_lens: Ints

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def one_each(self) -> bool:
        """True when every sequence has one row: a decode step."""
        return len(self.token_ids) == len(self.context_lens)

    def row_by_row(self) -> Placing:
        """The same rows as sequences of one row each. A row sees the ones before it all the same: each layer writes
        the keys and values of all rows before any of them reads."""
        if self.one_each:
            return self
        counts = np.diff(self.query_starts)
        starts = np.arange(self.num_rows + 1, dtype=np.int32)
        tables, contexts = np.repeat(self.block_tables, counts, axis=0), (self.positions + 1).astype(np.int32)
        return Placing(self.token_ids, self.positions, self.slots, tables, starts, contexts)

    def check(self, vocabulary: int, num_blocks: int, max_context: int) -> None:
        """What a CPU's kernels check themselves, for devices that can't be asked. Raises InternalError."""
        ids, tables = self.token_ids, self.block_tables
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise InternalError(f"token ids must be within [0, {vocabulary})")
        if int(tables.min()) < 0 or int(tables.max()) >= num_blocks:
            raise InternalError(f"a block table leaves the pool of {num_blocks} blocks")
        if int(self.context_lens.max()) > max_context:
            raise InternalError(f"a context of {int(self.context_lens.max())} tokens is over the limit {max_context}")


def place(slices: Sequence[Slice], block_size: int) -> Placing:
    """All rows of `slices`. Raises InternalError for an empty slice or one that its block table doesn't cover."""
    count = len(slices)
    lengths = np.fromiter((len(part.token_ids) for part in slices), np.int64, count)
    starts = np.fromiter((part.start for part in slices), np.int64, count)
    ends = starts + lengths
    widths = np.fromiter((len(part.block_table) for part in slices), np.int64, count)
    if lengths.min() < 1 or starts.min() < 0 or bool((ends > widths * block_size).any()):
        raise InternalError("a slice is empty, or its block table does not cover it")
    tables = np.zeros((count, int(widths.max())), np.int32)
    blocks = chain.from_iterable(part.block_table for part in slices)
    tables[np.arange(tables.shape[1]) < widths[:, None]] = np.fromiter(blocks, np.int32, int(widths.sum()))
    query_starts = np.zeros(count + 1, np.int32)
    np.cumsum(lengths, out=query_starts[1:])
    owner = np.repeat(np.arange(count), lengths)
    positions = np.arange(query_starts[-1], dtype=np.int64) - query_starts[owner] + starts[owner]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    ids = np.fromiter((token for part in slices for token in part.token_ids), np.int64, int(query_starts[-1]))
    return Placing(ids, positions, slots, tables, query_starts, ends.astype(np.int32))


def rows_to_sample(slices: Sequence[Slice], query_starts: Ints) -> Longs:
    """The rows whose logits are sampled, int64 [R]: of each slice that has samples the last, and one more a draft."""
    counts = np.fromiter((part.num_sampled_rows for part in slices), np.int64, len(slices))
    total = int(counts.sum())
    # Rows of a slice count up to its last one.
    behind = np.repeat(np.cumsum(counts), counts) - np.arange(total)
    return np.repeat(query_starts[1:].astype(np.int64), counts) - behind
