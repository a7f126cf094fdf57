"""Small arrays from the host to the device, all in one copy that nobody waits for.

Life of a buffer on the host: filled -> copied from, by the device -> filled again once that copy is over. There are a
few of them, so that the next step can be filled while the last one's copy may still wait for its turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.device.device import Device, Fence

Arrays = Mapping[str, npt.NDArray[Any]]
ALIGNMENT: Final = 64
BUFFERS: Final = 3
_DTYPES: Final = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float64): torch.float64}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each array lies within one piece of memory."""

    places: Mapping[str, tuple[int, np.dtype[Any], tuple[int, ...]]]
    nbytes: int

    @classmethod
    def of(cls, arrays: Arrays) -> Layout:
        """One behind the other, each at a multiple of ALIGNMENT."""
        places: dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}
        end = 0
        for name, array in arrays.items():
            places[name] = (end, array.dtype, array.shape)
            end = -(-(end + array.nbytes) // ALIGNMENT) * ALIGNMENT
        return cls(places, max(end, ALIGNMENT))

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The arrays within `memory` uint8 [nbytes], as tensors of its device."""
        found: dict[str, Tensor] = {}
        for name, (start, dtype, shape) in self.places.items():
            size = int(np.prod(shape)) * dtype.itemsize
            found[name] = memory[start : start + size].view(_DTYPES[dtype]).view(shape)
        return found


@dataclass(slots=True)
class _HostBuffer:
    memory: Tensor
    fence: Fence | None = None


@dataclass(slots=True)
class Staging:
    """Buffers of one engine; used by one thread."""

    device: Device
    _buffers: list[_HostBuffer] = field(default_factory=list)
    _turn: int = 0

    def send(self, arrays: Arrays, layout: Layout, target: Tensor) -> None:
        """Launch the copy of `arrays`, laid out as `layout` says, to `target` uint8 [layout.nbytes] on the device."""
        buffer = self._next(layout.nbytes)
        raw = buffer.memory.numpy()
        for name, (start, dtype, shape) in layout.places.items():
            array = arrays[name]
            raw[start : start + array.nbytes].view(dtype).reshape(shape)[...] = array
        target.copy_(buffer.memory[: layout.nbytes], non_blocking=True)
        buffer.fence = self.device.fence()

    def put(self, arrays: Arrays) -> dict[str, Tensor]:
        """The arrays as tensors of the device, in memory of their own."""
        layout = Layout.of(arrays)
        target = torch.empty(layout.nbytes, dtype=torch.uint8, device=self.device.torch)
        self.send(arrays, layout, target)
        return layout.views(target)

    def _next(self, nbytes: int) -> _HostBuffer:
        """A buffer that nothing is copied from any more."""
        if len(self._buffers) < BUFFERS:
            self._buffers.append(_HostBuffer(self.device.host_buffer(nbytes)))
            return self._buffers[-1]
        self._turn = (self._turn + 1) % BUFFERS
        buffer = self._buffers[self._turn]
        if buffer.fence is not None:
            buffer.fence.wait()
        if buffer.memory.nbytes < nbytes:
            buffer.memory = self.device.host_buffer(nbytes)
        return buffer
