"""A model file mapped into memory: bytes are read when touched and given back when dropped.

Life cycle: `MappedFile(path)` maps; `view` and `tensor` lend windows onto the map; `drop` tells the kernel that a
range's pages may go (a later touch reads the file again); `close` unmaps once no window is alive.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from tandem.errors import ModelFormatError


class MappedFile:
    """A private, copy-on-write map of a whole file; nothing here ever writes to it.

    Private rather than read-only, because torch warns about tensors over read-only memory.
    """

    def __init__(self, path: Path) -> None:
        """Raises ModelFormatError when the file is missing, unreadable or empty."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise ModelFormatError(f"{path}: the file is empty")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise ModelFormatError(f"{path}: cannot be read: {error.strerror}") from error

    def view(self, start: int, length: int) -> memoryview:
        """Bytes `start` to `start + length`, without a copy. The caller has checked the range."""
        return memoryview(self._map)[start : start + length]

    def tensor(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor over the map, without a copy. The caller has checked the range. Never write to it."""
        count = 1
        for side in shape:
            count *= side
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if start % dtype.itemsize:
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
            return raw.clone().view(dtype).view(shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)

    def drop(self, start: int, length: int) -> None:
        """Give back the pages that lie wholly within the range."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Unmap; while tensors over the map live, the map stays until the last one goes."""
        try:
            self._map.close()
        except BufferError:
            return
