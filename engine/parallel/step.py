"""A step as it goes from rank 0 to the others: where its rows lie, without what is drawn from them.

The message is numbers of 64 bits: a header of counts, then the arrays one after another. Nothing in it is run, or
looked up by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from engine.batch import Batch
from engine.placing import Longs, Placing, place, rows_to_sample
from tandem.errors import InternalError

_HEADER: Final = 8
"""Numbers: the way, sequences, blocks a table, rows, sampled rows, copies, blocks that arrived, sources."""
_MOST: Final = 1 << 24
"""Of each count."""


class Way(Enum):
    """How a step is computed; the first eight bytes of a message."""

    EAGER = b"TANDEM2E"
    REPLAYED = b"TANDEM2R"
    """By a captured graph, on a GPU."""
    WARM_UP = b"TANDEM2W"
    """Not at all: graphs are captured."""

    @property
    def number(self) -> int:
        """As the message has it."""
        return int.from_bytes(self.value, "little")


_WAYS: Final = {way.number: way for way in Way}


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Copies (source block, target block), then T rows of S sequences."""

    placing: Placing | None
    """None: there is nothing but copies."""
    rows: Longs
    """int64 [R]: those whose logits are wanted."""
    copies: Sequence[tuple[int, int]]
    arrived: Sequence[int] = ()
    """See `Batch.arrived`; on a GPU."""
    sources: Longs = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [T] as in `engine.device.inputs.step_arrays`, on a GPU; empty: all tokens are known."""
    way: Way = Way.EAGER


def step_of(batch: Batch, block_size: int) -> Step:
    """What `batch` computes. Raises InternalError as `place`."""
    if not batch.slices:
        return Step(None, np.zeros(0, np.int64), batch.copies)
    placing = place(batch.slices, block_size)
    return Step(placing, rows_to_sample(batch.slices, placing.query_starts), batch.copies)


def encode(step: Step) -> bytes:
    """The message."""
    arrived, copies = np.array(step.arrived, np.int64), np.array(step.copies, np.int64).ravel()
    arrays: list[npt.NDArray[Any]] = [step.rows, copies, arrived, step.sources]
    counts: tuple[int, ...] = (0, 0, 0)
    if (placing := step.placing) is not None:
        counts = (*placing.block_tables.shape, placing.num_rows)
        arrays += [placing.token_ids, placing.positions, placing.slots]
        arrays += [placing.block_tables.ravel(), placing.query_starts, placing.context_lens]
    counts = (*counts, len(step.rows), len(step.copies), len(arrived), len(step.sources))
    header = np.array([step.way.number, *counts], np.int64)
    return np.concatenate([header, *arrays], dtype=np.int64).tobytes()


def decode(message: bytearray) -> Step:
    """The step. Raises InternalError for what is none, or another version's."""
    if len(message) % 8 or len(message) < 8 * _HEADER:
        raise InternalError(f"a message of {len(message)} bytes is no step")
    numbers = np.frombuffer(message, np.int64)
    way, *counts = numbers[:_HEADER].tolist()
    if way not in _WAYS or not all(0 <= count <= _MOST for count in counts):
        raise InternalError("a message is no step of this version")
    sequences, width, rows, sampled, copies, arrived, sources = counts
    sizes = [sampled, 2 * copies, arrived, sources]
    if sequences:
        sizes += [rows, rows, rows, sequences * width, sequences + 1, sequences]
    if len(numbers) != _HEADER + sum(sizes):
        raise InternalError(f"a step of {sum(sizes)} numbers comes as {len(numbers) - _HEADER}")
    wanted, pairs, come, draws, *rest = np.split(numbers[_HEADER:], np.cumsum(sizes)[:-1])
    placing = None
    if sequences:
        ids, positions, slots, tables, starts, lens = rest
        ints = [array.astype(np.int32) for array in (tables, starts, lens)]
        placing = Placing(ids, positions, slots, ints[0].reshape(sequences, width), ints[1], ints[2])
    moves = [(source, target) for source, target in pairs.reshape(-1, 2).tolist()]
    return Step(placing, wanted, moves, come.tolist(), draws, _WAYS[way])
