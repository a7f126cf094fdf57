"""KV blocks of a GPU on the host, where transfers read and write them.

A prefill worker's blocks go there as steps write them: each step brings what it wrote, and is over when that has
arrived. A decode worker's come from there: blocks that a transfer has filled are in `Batch.arrived` of the next step.
Blocks travel in pieces through pinned memory: gathered on the device, copied once, laid out on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.device.device import Device, Fence
from engine.kv_cache import DeviceKVCache

PIECE_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Outbound:
    """Blocks on their way to the host."""

    blocks: npt.NDArray[np.int64]
    pieces: Sequence[Tensor]
    """uint8 [n, block_bytes] each, on the host once `fence` is over."""
    fence: Fence


class HostMirror:
    """One engine's blocks on both sides; used by one thread."""

    def __init__(self, kv_cache: DeviceKVCache, device: Device, memory: memoryview) -> None:
        """`memory` holds exactly the cache's bytes."""
        self._device = device
        self._blocks = kv_cache.blocks
        self._host: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8).reshape(self._blocks.shape)
        self._piece = max(1, PIECE_BYTES // self._host.shape[1])

    def start(self, blocks: npt.NDArray[np.int64]) -> Outbound:
        """Launch the copies of `blocks`, as the steps launched so far leave them."""
        pieces: list[Tensor] = []
        for first in range(0, len(blocks), self._piece):
            ids = torch.from_numpy(blocks[first : first + self._piece]).to(self._device.torch, non_blocking=True)
            gathered = self._blocks[ids]
            host = self._device.host_buffer(gathered.numel()).view(gathered.shape)
            pieces.append(host.copy_(gathered, non_blocking=True))
        return Outbound(blocks, pieces, self._device.fence())

    def finish(self, outbound: Outbound) -> None:
        """Wait for the copies and put the blocks where transfers read them."""
        outbound.fence.wait()
        for number, piece in enumerate(outbound.pieces):
            first = number * self._piece
            self._host[outbound.blocks[first : first + self._piece]] = piece.numpy()

    def bring(self, blocks: Sequence[int]) -> None:
        """Launch the copies of blocks that transfers have filled to the device. Their memory may change afterwards."""
        for first in range(0, len(blocks), self._piece):
            part = np.asarray(blocks[first : first + self._piece], np.int64)
            staged = self._device.host_buffer(len(part) * self._host.shape[1]).view(len(part), -1)
            staged.numpy()[...] = self._host[part]
            ids: Any = torch.from_numpy(part).to(self._device.torch, non_blocking=True)
            self._blocks[ids] = staged.to(self._device.torch, non_blocking=True)
