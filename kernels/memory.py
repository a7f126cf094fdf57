"""Memory for what is read from end to end again and again: weights, the KV cache. Huge pages where the system has them.

With pages of 4 KB a virtual machine's address translation costs a plain read from end to end a third of the memory's
bandwidth (25 against 36 GB/s were measured). Products ask for their weights ahead and were as fast from either, which
is why weights may lie in memory that processes share, where huge pages are rare; keys and values lie in pieces.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable

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

    def __init__(self, capacity: int, fd: int | None = None, *, filled: bool = False) -> None:
        """`capacity` in bytes is address space only: pages are taken from the machine when first written.

        `fd`: a memfd of that size at least, whose pages are used instead of private ones; it stays the caller's.
        `filled`: what is in it counts, and is mapped read-only: cut it by `at`.

        Raises ConfigError when there is not even the address space.
        """
        try:
            pages = _map(max(capacity, mmap.PAGESIZE), fd, read_only=filled)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(f"can't reserve {capacity} bytes for weights: {error}") from error
        advise_huge(pages)
        with warnings.catch_warnings():
            # torch knows no tensors that can't be written, and says so. A write would end the process.
            warnings.simplefilter("ignore", UserWarning)
            self._memory = torch.frombuffer(pages, dtype=torch.uint8)
        self._pages = weakref.ref(pages)
        self._lock = threading.Lock()
        self._used = self._memory.nbytes if filled else 0

    def take(self, nbytes: int) -> torch.Tensor:
        """A zeroed uint8 tensor [nbytes] at a multiple of 64. Raises InternalError when the region is full."""
        with self._lock:
            start = -(-self._used // ALIGNMENT) * ALIGNMENT
            if start + nbytes > self._memory.nbytes:
                raise InternalError(f"{nbytes} bytes do not fit: {start} of {self._memory.nbytes} are used")
            self._used = start + nbytes
        return self._memory[start : start + nbytes]

    def at(self, offset: int, nbytes: int) -> torch.Tensor:
        """The uint8 tensor [nbytes] that was taken at byte `offset`. Raises InternalError for one that can't have been.

        The offset of a tensor from `take` is its `storage_offset()`.
        """
        if offset % ALIGNMENT or not 0 <= offset <= offset + nbytes <= self._used:
            raise InternalError(f"no {nbytes} bytes were taken at {offset}")
        return self._memory[offset : offset + nbytes]

    def freeze(self) -> None:
        """Make all of it read-only: a stray write would change the weights of other processes too. Linux only.

        Raises OSError.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(
            ctypes.c_void_p(self._memory.data_ptr()), ctypes.c_size_t(self._memory.nbytes), mmap.PROT_READ
        ):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def when_freed(self, callback: Callable[[], object]) -> None:
        """Call once the region and all that was cut from it are gone: in any thread, perhaps amid a collection."""
        pages = self._pages()
        assert pages is not None, "the region lives as long as this arena"
        weakref.finalize(pages, callback).atexit = False


def _map(nbytes: int, fd: int | None, *, read_only: bool) -> mmap.mmap:
    if fd is None:
        return mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    access = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(fd, nbytes, mmap.MAP_SHARED | _NORESERVE, access)
