"""Another process's pool, mapped read-only once everything that it says of itself is checked."""

from __future__ import annotations

import fcntl
import mmap
import os

from kv_transfer.pool import HEADER, MAGIC, MAX_POOL_BYTES, PoolView
from tandem.errors import IncompatibleError, UnavailableError


def map_pool(fd: int) -> PoolView:
    """Map another process's pool read-only. `fd` stays the caller's.

    Raises IncompatibleError for what isn't a sealed memfd holding all that its header says: nothing is mapped then
    beyond what is sure to exist.
    """
    size = _sealed_size(fd)
    header = os.pread(fd, HEADER.size, 0)
    if len(header) != HEADER.size:
        raise unsafe(f"{size} bytes hold no header")
    magic, num_blocks, block_bytes, generations_at, blocks_at = HEADER.unpack(header)
    if magic != MAGIC:
        raise unsafe("unknown header")
    generations_end, blocks_end = generations_at + 8 * num_blocks, blocks_at + num_blocks * block_bytes
    fits = HEADER.size <= generations_at and generations_end <= blocks_at and blocks_end <= size <= 2 * MAX_POOL_BYTES
    if not fits or not num_blocks or not block_bytes or generations_at % 8:
        raise unsafe(f"{num_blocks} blocks of {block_bytes} bytes don't fit {size} bytes")
    try:
        whole = memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
    except OSError as error:
        raise UnavailableError(f"can't map {size} bytes: {error}", reason="MAP_FAILED") from error
    return PoolView(
        buffer=whole[blocks_at:blocks_end],
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        generations=whole[generations_at:generations_end].cast("Q"),
    )


def _sealed_size(fd: int) -> int:
    """Bytes of a memfd that can't shrink any more, so that reading what is mapped can't raise SIGBUS."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise unsafe("no memfd") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise unsafe("not sealed against shrinking")
    return os.fstat(fd).st_size


def unsafe(what: str) -> IncompatibleError:
    """What the memory, or what came with it, must not be."""
    return IncompatibleError(f"the sender's shared memory is refused: {what}", reason="UNSAFE_MEMORY")
