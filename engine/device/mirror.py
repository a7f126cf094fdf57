"""KV blocks of a GPU on the host, where transfers read and write them.

A prefill worker's blocks go there as steps write them: each step brings what it wrote, and is over when that has
arrived. A decode worker's come from there: blocks that a transfer has filled are in `Batch.arrived` of the next step.
Copies go straight from one block to the other, beside the steps; the host touches no byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.device.device import Device, Fence
from engine.device.pinning import PinnedBlocks
from engine.kv_cache import DeviceKVCache


@dataclass(frozen=True, slots=True, eq=False)
class Outbound:
    """Blocks on their way to the host: there once `fence` is over."""

    fence: Fence


class HostMirror:
    """One engine's blocks on both sides; used by one thread."""

    def __init__(self, kv_cache: DeviceKVCache, device: Device, memory: memoryview) -> None:
        """`memory` holds exactly the cache's bytes."""
        self._device, self._lane = device, device.lane()
        self._blocks = kv_cache.blocks
        self._host = torch.frombuffer(memory, dtype=torch.uint8).view(self._blocks.shape)
        self._pinned = PinnedBlocks(self._host, device)

    def start(self, blocks: npt.NDArray[np.int64]) -> Outbound:
        """Launch the copies of `blocks`, ascending, as the steps launched so far leave them. A block may be written
        again before they are over; what is there by then may be either.
        """
        with self._lane.use(behind_steps=True):
            for run in self._pinned.runs(blocks.tolist()):
                self._host[run].copy_(self._blocks[run], non_blocking=True)
            return Outbound(self._device.fence())

    def finish(self, outbound: Outbound) -> None:
        """Wait until the blocks are where transfers read them."""
        outbound.fence.wait()

    def bring(self, blocks: Sequence[int]) -> None:
        """Copy blocks that transfers have filled to the device, and wait for that: their memory may change afterwards.
        No step that runs may name them.
        """
        with self._lane.use(behind_steps=False):
            for run in self._pinned.runs(sorted(set(blocks))):
                self._blocks[run].copy_(self._host[run], non_blocking=True)
            fence = self._device.fence()
        fence.wait()
