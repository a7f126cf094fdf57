"""Rows of the embedding table by token id. C++: embedding.cpp; a copy (and an exact widening of bf16)."""

from __future__ import annotations

import ctypes
import functools

import torch

from kernels import build, check, dispatch
from tandem.errors import InternalError


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load_library("embedding.cpp")
    assert lib is not None, "the cpp implementation is selected only when its libraries load"
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    lib.tandem_embedding.argtypes = [pointer, pointer, pointer, i64, i64, i64, ctypes.c_int32]
    lib.tandem_embedding.restype = i64
    return lib


def embedding(ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return table rows as float32: ids [T] int64, table [V, W] float32 or bfloat16 (contiguous), result [T, W].

    Raises InternalError for wrong shapes or dtypes, or an id outside [0, V).
    """
    if table.dim() != 2 or table.dtype not in check.FLOATS or not table.is_contiguous() or not table.is_cpu:
        raise check.fail("table", table, "contiguous float32 or bfloat16 [V, W] on the CPU")
    check.vector("ids", ids, torch.int64)
    count, (vocabulary, width) = ids.shape[0], table.shape
    if out is None:
        out = torch.empty((count, width), dtype=torch.float32)
    else:
        check.dense("out", out, (count, width))
    if dispatch.select().name != "cpp":
        if count and bool(((ids < 0) | (ids >= vocabulary)).any()):
            raise InternalError(f"a token id is outside [0, {vocabulary})")
        return out.copy_(embedding_reference(ids, table))
    bad = _library().tandem_embedding(
        ids.data_ptr(), table.data_ptr(), out.data_ptr(), count, vocabulary, width, table.dtype is torch.bfloat16
    )
    if bad >= 0:
        raise InternalError(f"token id {int(ids[bad])} at index {bad} is outside [0, {vocabulary})")
    return out


def embedding_reference(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Do what `embedding` does, by torch (IndexError for an id outside the table)."""
    return table[ids].to(torch.float32)
