"""Memory for what is read from end to end again and again: weights, the KV cache. Huge pages where the system has them.

A step reads all weights; with pages of 4 KB a virtual machine's address translation costs it a third of the memory's
bandwidth (25 against 36 GB/s were measured).
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading

import torch

from tandem.errors import ConfigError, InternalError

ALIGNMENT = 64
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Linux's number for older Pythons. Without it more than the machine's memory is refused, however little is used."""


def advise_huge(pages: mmap.mmap) -> None:
    """Ask for huge pages before the first touch. A hint; nothing depends on it."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)


class Arena:
    """One region that tensors are cut from, one after another; all live as long as any does. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        """`capacity` in bytes is address space only: pages are taken from the machine when first written.

        Raises ConfigError when there is not even that.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        try:
            pages = mmap.mmap(-1, max(capacity, mmap.PAGESIZE), flags)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(f"can't reserve {capacity} bytes for weights: {error}") from error
        advise_huge(pages)
        self._memory = torch.frombuffer(pages, dtype=torch.uint8)
        self._lock = threading.Lock()
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """A zeroed uint8 tensor [nbytes] at a multiple of 64. Raises InternalError when the region is full."""
        with self._lock:
            start = -(-self._used // ALIGNMENT) * ALIGNMENT
            if start + nbytes > self._memory.nbytes:
                raise InternalError(f"{nbytes} bytes do not fit: {start} of {self._memory.nbytes} are used")
            self._used = start + nbytes
        return self._memory[start : start + nbytes]
