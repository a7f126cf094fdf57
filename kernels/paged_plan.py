"""What planners of attention are given of a step: from the host's lengths and tables, without asking the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.backends import HostStep


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """A step's block tables as FlashInfer reads them: the blocks of all sequences in one row, those in use alone.

    Planners read lengths on the host, kernels read indices on the device. A row of padding is given one position of
    its first block: planners want a page of every sequence, and what comes of it is never looked at.
    """

    query_starts: Tensor
    """int32 [S + 1] on the host, as `HostStep.query_starts`."""
    starts: Tensor
    """int32 [S + 1] on the host: sequence s has indices[starts[s]:starts[s + 1]]."""
    indices: Tensor
    """int32 [starts[S]] on the device: numbers of blocks."""
    last_lens: Tensor
    """int32 [S] on the host: positions of each sequence's last block, 1 to block_size."""

    @classmethod
    def of(cls, step: HostStep, block_size: int, device: torch.device) -> Pages:
        """Launches the copy of the indices, and doesn't wait for it."""
        lengths = np.maximum(step.context_lens, 1)
        counts = -(-lengths // block_size)
        starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        used = np.arange(step.block_tables.shape[1]) < counts[:, None]
        last = (lengths - (counts - 1) * block_size).astype(np.int32)
        indices = send(step.block_tables[used], device)
        return cls(_host(step.query_starts, device), _host(starts, device), indices, _host(last, device))


def send(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy of `array` on the device, launched and not waited for; `array` may change afterwards."""
    return _host(array, device).to(device, non_blocking=True)


def _host(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the host; pinned for a GPU, so that nobody waits for what is sent there from it. torch keeps such
    memory until it has been read.
    """
    copy = torch.from_numpy(array.copy())
    return copy.pin_memory() if device.type == "cuda" else copy
