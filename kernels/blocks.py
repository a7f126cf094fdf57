"""Whole-block copies within the paged KV cache (copy-on-write). C++: blocks.cpp."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch

from kernels import build, check, dispatch
from tandem.errors import InternalError


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load_library("blocks.cpp")
    assert lib is not None, "the cpp implementation is selected only when its libraries load"
    i64 = ctypes.c_int64
    lib.tandem_copy_blocks.argtypes = [ctypes.c_void_p, ctypes.POINTER(i64), i64, i64, i64]
    lib.tandem_copy_blocks.restype = i64
    return lib


def copy_blocks(cache: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy block `source` over block `target` for each (source, target), one after the other.

    `cache` is [num_blocks, ...], contiguous, any dtype: the whole cache, all layers at once. Raises InternalError for a
    non-contiguous cache or a block outside it, before anything is copied.
    """
    if not pairs:
        return
    if cache.dim() < 1 or not cache.is_contiguous() or not cache.is_cpu:
        raise check.fail("cache", cache, "a contiguous [num_blocks, ...] on the CPU")
    num_blocks = cache.shape[0]
    if dispatch.select().name != "cpp":
        if any(not (0 <= block < num_blocks) for pair in pairs for block in pair):
            raise InternalError(f"a block of {list(pairs)} is outside [0, {num_blocks})")
        copy_blocks_reference(cache, pairs)
        return
    flat = (ctypes.c_int64 * (2 * len(pairs)))(*(block for pair in pairs for block in pair))
    block_bytes = math.prod(cache.shape[1:]) * cache.element_size()
    bad = _library().tandem_copy_blocks(cache.data_ptr(), flat, len(pairs), num_blocks, block_bytes)
    if bad >= 0:
        raise InternalError(f"the copy {pairs[bad]} names a block outside [0, {num_blocks})")


def copy_blocks_reference(cache: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Do what `copy_blocks` does, by torch."""
    for source, target in pairs:
        cache[target] = cache[source].clone()
