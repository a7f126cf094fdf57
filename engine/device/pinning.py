"""Memory of a KV pool on the host that a GPU copies from and to by itself: pinned piece by piece, when first used.

Pinning takes the pages from the machine, so what is never used is never taken. A piece that can't be pinned is copied
all the same, more slowly: the driver goes by memory of its own, and the host waits for it.
"""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Final

from torch import Tensor

from engine.device.device import Device

logger = logging.getLogger("engine")
PIECE_BYTES: Final = 64 << 20
"""Pinned at once: a few hundredths of a second, most of it for pages that are new."""


class PinnedBlocks:
    """Blocks [n, block_bytes] of one engine; used by one thread."""

    def __init__(self, blocks: Tensor, device: Device) -> None:
        """uint8 on the host; nothing is pinned yet. Pieces are whole pages, or no page would be in one piece only."""
        self._blocks, self._device = blocks, device
        size = blocks.shape[1]
        pages = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, size)
        self._piece = max(1, PIECE_BYTES // (size * pages)) * pages
        self._known: set[int] = set()
        self._aligned = blocks.data_ptr() % mmap.PAGESIZE == 0

    def runs(self, numbers: Sequence[int]) -> Iterator[slice]:
        """`numbers`, ascending, as stretches of blocks that lie side by side within one piece, which is pinned now."""
        start = 0
        for at in range(1, len(numbers) + 1):
            goes_on = at < len(numbers) and numbers[at] == numbers[at - 1] + 1
            if not goes_on or numbers[at] % self._piece == 0:
                self._pin(numbers[start] // self._piece)
                yield slice(numbers[start], numbers[at - 1] + 1)
                start = at

    def _pin(self, piece: int) -> None:
        if piece in self._known or not self._aligned:
            return
        self._known.add(piece)
        memory = self._blocks[piece * self._piece : (piece + 1) * self._piece]
        if not self._device.pin(memory):
            self._aligned = False
            logger.warning("the host's KV blocks can't be pinned: transfers to and from the GPU are slower")
