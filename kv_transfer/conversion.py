"""Puts what lies in a sender's blocks into a reader's blocks: other block sizes, orders, dtypes and runs of heads.

numpy only; copying and arithmetic run without the GIL. Nothing is allocated but what one stretch of float32 takes.
Slots of the reader's last block behind the last token are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np
import numpy.typing as npt

from kv_transfer.formats import STORAGE, Codes, Floats, from_float32, quantize, to_float32
from kv_transfer.plan import HeadRun, Piece, Stretch, TransferPlan
from tandem.kv_layout import PAIRED_ORDER, KvLayout

PAIR: Final[dict[int, npt.DTypeLike]] = {1: np.uint16, 2: np.uint32}
"""By an element's bytes: what holds two side by side."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Some slots of one block: codes [layers, 2, heads, block_size, head_dim], perhaps in pairs."""

    codes: Codes
    paired: bool
    first: int
    count: int

    @property
    def lanes(self) -> list[Codes]:
        """Views that together cover the slots, one way for every order, so that two `Slots` are copied lane by lane.

        Plain [L, 2, H, count, D]; else keys as pairs of dims, values of every other slot, and of those between.
        """
        keys, values = self.codes[:, 0], self.codes[:, 1]
        layers, heads, size, dim = keys.shape
        end = self.first + self.count
        if not self.paired:
            pairs = keys.view(PAIR[keys.itemsize])[:, :, self.first : end]
            return [pairs, *(values[:, :, self.first + i : end : 2] for i in (0, 1))]
        # Keys [D / 2, size, 2], a pair taken as one number; values [size / 2, D, 2].
        flat = keys.reshape(layers, heads, size * dim).view(PAIR[keys.itemsize])
        key_pairs = flat.reshape(layers, heads, dim // 2, size)
        value_pairs = values.reshape(layers, heads, size // 2, dim, 2)
        lanes = [key_pairs[:, :, :, self.first : end].swapaxes(2, 3)]
        for first in (self.first, self.first + 1):
            last = first + (end - 1 - first) // 2 * 2  # of this lane; below `first` when it has no slot
            lanes.append(value_pairs[:, :, first // 2 : last // 2 + 1, :, first % 2])
        return lanes

    @property
    def plain(self) -> Codes:
        """[L, 2, H, count, D]: a view, or a copy out of pairs."""
        if not self.paired:
            return self.codes[:, :, :, self.first : self.first + self.count]
        shape = (*self.codes.shape[:3], self.count, self.codes.shape[4])
        copied = np.empty(shape, self.codes.dtype)
        copy_slots(self, Slots(copied, False, 0, self.count))
        return copied


def copy_slots(source: Slots, target: Slots) -> None:
    """Copy codes of one type, whatever the orders."""
    if not source.paired and not target.paired:
        np.copyto(target.plain, source.plain)
        return
    for ours, theirs in zip(source.lanes, target.lanes, strict=True):
        np.copyto(theirs, ours)


class Blocks:
    """Some heads of a pool's blocks as arrays over its memory."""

    def __init__(self, buffer: memoryview, layout: KvLayout, first_head: int, heads: int) -> None:
        """`buffer` holds whole blocks of `layout`."""
        raw = np.frombuffer(buffer, np.uint8).reshape(-1, layout.block_bytes)
        outer = (len(raw), layout.num_layers, 2, layout.num_kv_heads)
        codes = raw[:, : layout.data_bytes].view(STORAGE[layout.dtype])
        run = slice(first_head, first_head + heads)
        self._codes = codes.reshape(*outer, layout.block_size, layout.head_dim)[:, :, :, run]
        self._paired = layout.order == PAIRED_ORDER
        self.dtype = layout.dtype
        self.scales: Floats | None = None
        """[blocks, layers, 2, heads, block_size]."""
        if layout.quantized:
            scales = raw[:, layout.scales_at :].view(np.float32)
            self.scales = scales.reshape(*outer, layout.block_size)[:, :, :, run]

    def slots(self, block: int, first: int, count: int) -> Slots:
        """`count` slots of a block, from slot `first` on."""
        return Slots(self._codes[block], self._paired, first, count)

    def values(self, block: int, first: int, count: int) -> Floats:
        """What those slots hold: [layers, 2, heads, count, head_dim]."""
        values = to_float32(self.slots(block, first, count).plain, self.dtype)
        return values if self.scales is None else values * self.scales[block, ..., first : first + count, None]

    def write(self, block: int, first: int, values: Floats) -> None:
        """Round [layers, 2, heads, count, head_dim] into the slots from `first` on."""
        count = values.shape[3]
        if self.scales is None:
            codes = from_float32(values, self.dtype)
        else:
            codes, self.scales[block, ..., first : first + count] = quantize(values, self.dtype)
        copy_slots(Slots(codes, False, 0, count), self.slots(block, first, count))


def convert(
    plan: TransferPlan,
    piece: Piece,
    run: HeadRun,
    staged: memoryview,
    target: memoryview,
    target_blocks: Sequence[int],
) -> None:
    """Bring one run of heads of a piece over.

    `staged` holds the piece's blocks of the source rank one after another; `target` is the target rank's whole pool, of
    which `target_blocks` are the piece's.
    """
    source = Blocks(staged, plan.source, run.source_head, run.count)
    into = Blocks(target, plan.target, run.target_head, run.count)
    by_block = groupby(plan.stretches(piece), key=lambda stretch: stretch.target_block)
    for (_, stretches), block in zip(by_block, target_blocks, strict=True):
        _convert_block(source, into, list(stretches), block)


def _convert_block(source: Blocks, into: Blocks, stretches: list[Stretch], block: int) -> None:
    """All that comes into one of the reader's blocks."""
    for part in stretches:
        if source.dtype != into.dtype:
            into.write(block, part.target_slot, source.values(part.source_block, part.source_slot, part.count))
            continue
        ours = source.slots(part.source_block, part.source_slot, part.count)
        copy_slots(ours, into.slots(block, part.target_slot, part.count))
        if source.scales is not None and into.scales is not None:
            scales = source.scales[part.source_block, ..., part.source_slot : part.source_slot + part.count]
            into.scales[block, ..., part.target_slot : part.target_slot + part.count] = scales
