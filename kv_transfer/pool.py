"""Memory that holds a pool's blocks and their generations.

Life of a SharedPool: created by its owner (sparse: no page is touched) -> the engine writes blocks, its block pool
writes generations -> `close()`. The memory itself lives as long as anybody maps it, here or in another process.

The owner writes a block's new generation before it writes the block again; a reader compares generations before and
after it copies. That order holds between processes: x86-64 keeps stores and loads in order, elsewhere the
interpreter's lock, released and taken around each copy, is the barrier.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tandem.errors import ConfigError

HEADER = struct.Struct("<8sQQQQ")
"""Of a shared pool: magic, number of blocks, bytes a block, offset of the generations, offset of the blocks."""
MAGIC = b"TNDMKV01"
_PAGE = 4096
_F_SEAL_FUTURE_WRITE = 0x10
MAX_POOL_BYTES = 1 << 44


class PoolMemory(Protocol):
    """A pool's memory as the transports see it."""

    @property
    def buffer(self) -> memoryview:
        """All blocks: uint8 [num_blocks * block_bytes]."""

    @property
    def block_bytes(self) -> int:
        """Bytes a block."""

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""

    @property
    def generations(self) -> memoryview:
        """uint64 [num_blocks], bumped by the owner before a block is handed out again."""


@dataclass(frozen=True)
class PoolView:
    """A PoolMemory over memory that somebody else owns, such as a KV cache's `blocks_view()`."""

    buffer: memoryview
    block_bytes: int
    num_blocks: int
    generations: memoryview
    whole: memoryview | None = None
    """The memory that `buffer` is a piece of, where other views have other pieces."""

    def __post_init__(self) -> None:
        """Raises ConfigError when the sizes disagree."""
        if self.buffer.nbytes != self.num_blocks * self.block_bytes or len(self.generations) != self.num_blocks:
            raise ConfigError(
                f"a pool of {self.num_blocks} blocks of {self.block_bytes} bytes doesn't fit a buffer of "
                f"{self.buffer.nbytes} bytes and {len(self.generations)} generations"
            )


class LocalPool:
    """A pool in anonymous memory of this process. Pages are touched on first use."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        """Reserve the memory. Raises ConfigError for sizes that can't be."""
        _check_sizes(num_blocks, block_bytes)
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.buffer = memoryview(_map(-1, num_blocks * block_bytes))
        self.generations = memoryview(bytearray(8 * num_blocks)).cast("Q")


class SharedPool:
    """A pool in a memfd: [header | generations | blocks], sealed against shrinking, growing and new writers."""

    def __init__(self, num_blocks: int, block_bytes: int, lend: Callable[[int], None] | None = None) -> None:
        """Reserve the memory. `lend` gives the descriptor to one more writer, who has mapped it (`map_lent`) when it
        returns. Raises ConfigError where that fails or the system has no memfd.
        """
        _check_sizes(num_blocks, block_bytes)
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        generations_at, blocks_at, size = _places(num_blocks, block_bytes)
        fd = _create_memfd(size)
        try:
            self._map = _map(fd, size)
            if lend is not None:
                lend(fd)
            _seal(fd)
            # A description of its own, so that whoever gets it can't write through it.
            self._read_only_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"can't set up shared memory: {error}") from error
        finally:
            os.close(fd)
        HEADER.pack_into(self._map, 0, MAGIC, num_blocks, block_bytes, generations_at, blocks_at)
        whole = memoryview(self._map)
        self.generations = whole[generations_at : generations_at + 8 * num_blocks].cast("Q")
        self.buffer = whole[blocks_at:size]

    @property
    def read_only_fd(self) -> int:
        """The descriptor to pass to readers; ConfigError after `close`."""
        if self._read_only_fd < 0:
            raise ConfigError("the shared pool is closed")
        return self._read_only_fd

    def close(self) -> None:
        """Stop giving the memory away. Unmapped when the last view of it (a tensor, a slice) is gone. Idempotent."""
        if self._read_only_fd >= 0:
            fd, self._read_only_fd = self._read_only_fd, -1
            os.close(fd)
            self.generations = memoryview(b"").cast("Q")
            self.buffer = memoryview(b"")
            del self._map


def map_lent(fd: int, num_blocks: int, block_bytes: int) -> memoryview:
    """The blocks of a SharedPool that another process has made and lends, to be written: uint8 [num_blocks *
    block_bytes]. The descriptor stays the caller's. Raises ConfigError when it holds something else.
    """
    _, blocks_at, size = _places(num_blocks, block_bytes)
    if (found := os.fstat(fd).st_size) != size:
        raise ConfigError(f"memory of {found} bytes was lent for {num_blocks} blocks of {block_bytes} bytes")
    return memoryview(_map(fd, size))[blocks_at:size]


def _places(num_blocks: int, block_bytes: int) -> tuple[int, int, int]:
    """Of a shared pool: where generations begin, where blocks begin, where it ends."""
    blocks_at = _round_up(_PAGE + 8 * num_blocks)
    return _PAGE, blocks_at, blocks_at + num_blocks * block_bytes


def _check_sizes(num_blocks: int, block_bytes: int) -> None:
    if num_blocks < 1 or block_bytes < 1 or num_blocks * block_bytes > MAX_POOL_BYTES:
        raise ConfigError(
            f"a pool of {num_blocks} blocks of {block_bytes} bytes: allowed are 1 byte to {MAX_POOL_BYTES}"
        )


def _round_up(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _map(fd: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size)
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't reserve {size} bytes for KV blocks: {error}") from error


def _create_memfd(size: int) -> int:
    if sys.platform != "linux":
        raise ConfigError("shared memory needs Linux (memfd); use --transport grpc")
    fd = os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"can't reserve {size} bytes of shared memory: {error}") from error
    return fd


def _seal(fd: int) -> None:
    """Fix the size for ever; and, where the kernel knows how (5.1), allow no writer beside the map that exists."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
    except OSError:
        return
