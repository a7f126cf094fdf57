"""Rows of the embedding table by token id, on a GPU; a table may hold a part of the vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import FLOATS, Launch, require, require_dense

BLOCK = 1024


@triton.jit
def _embedding(
    ids_ptr: tl.tensor,
    table_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64) - first
    mask = at < width
    values = tl.load(table_ptr + row * width + at, mask=mask & (row >= 0) & (row < rows), other=0.0)
    tl.store(out_ptr + token * width + at, values.to(out_ptr.dtype.element_ty), mask=mask)


def embedding_launch(ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor, first: int) -> Launch:
    """The launch of one look-up."""
    rows, width = table.shape
    block = min(BLOCK, max(16, int(triton.next_power_of_2(width))))
    args = {"ids_ptr": ids, "table_ptr": table, "out_ptr": out, "first": first, "rows": rows, "width": width}
    return Launch(_embedding, (ids.shape[0], -(-width // block)), args, {"BLOCK": block})


def embedding(
    ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None, *, first: int = 0
) -> torch.Tensor:
    """Return table rows: ids [T] int64 or int32, table [rows, W] (16 bits or float32), result [T, W] like the table,
    or in `out` and its dtype.

    The table holds ids first to first + rows - 1. Another id gives zeros, so that parts of a vocabulary can be summed.
    Raises InternalError for wrong shapes or dtypes.
    """
    require(
        table.dim() == 2 and table.dtype in FLOATS and table.is_contiguous(), "table", table, "contiguous [rows, W]"
    )
    require(ids.dim() == 1, "ids", ids, "[T]")
    require_dense("ids", ids, tuple(ids.shape), (torch.int64, torch.int32), table)
    shape = (ids.shape[0], table.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=table.dtype, device=table.device)
    else:
        require_dense("out", out, shape, FLOATS, table)
    embedding_launch(ids, table, out, first).run()
    return out


def embedding_reference(ids: torch.Tensor, table: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Do what `embedding` does, by torch."""
    rows = ids.long() - first
    inside = (rows >= 0) & (rows < table.shape[0])
    return table[rows.where(inside, 0)] * inside[:, None]
