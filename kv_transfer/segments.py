"""Where bytes lie, as whoever reads memory by its address must know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_transfer.pool import PoolMemory

HOST = "DRAM"
DEVICE = "VRAM"


@dataclass(frozen=True, slots=True)
class Segment:
    """`nbytes` bytes from `address` on. `kind` and `device` as NIXL names them: DRAM, or VRAM of GPU number `device`.

    Says nothing about the life of the memory: whoever registers a segment holds on to its owner.
    """

    address: int
    nbytes: int
    kind: str = HOST
    device: int = 0


def of_buffer(buffer: memoryview) -> Segment:
    """The segment of host memory, writable or not."""
    array = np.frombuffer(buffer, dtype=np.uint8)
    return Segment(array.ctypes.data, array.nbytes)


def of_tensor(tensor: Any) -> Segment:
    """The segment of a contiguous torch tensor, on the CPU or on a GPU; this room doesn't import torch itself."""
    on_gpu = tensor.device.type != "cpu"
    nbytes = tensor.numel() * tensor.element_size()
    return Segment(tensor.data_ptr(), nbytes, DEVICE if on_gpu else HOST, tensor.device.index or 0)


def of_pool(pool: PoolMemory) -> Segment:
    """The segment of a pool's blocks. A pool whose blocks lie in a tensor says so: it has an attribute `tensor`."""
    tensor = getattr(pool, "tensor", None)
    return of_buffer(pool.buffer) if tensor is None else of_tensor(tensor)


def whole_of(pool: PoolMemory) -> memoryview | None:
    """The memory that a pool is a view of, if it says so by an attribute `whole`: registered once for all views."""
    whole: memoryview | None = getattr(pool, "whole", None)
    return whole
