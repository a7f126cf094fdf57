"""Products over few rows share out k as well: there are too few tiles to keep a GPU's memory busy.

Each program of a product then writes the sum over its part of k, in float32, and a second launch adds the parts in
order: the same bits at every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launch, target

PROGRAMS = 256
"""As many as keep the memory of a large GPU busy."""
MOST = 8
LEAST_STEPS = 4
"""Steps over k that a program has at least."""


@triton.jit
def part_of(steps: tl.tensor, part: tl.tensor, SPLITS: tl.constexpr) -> tl.tensor:
    """(first, last + 1) of the steps over k that belong to `part`."""
    each = tl.cdiv(steps, SPLITS)
    first = part * each
    return first, tl.minimum(first + each, steps)


@triton.jit
def _add_parts(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    elements: tl.tensor,
    n: tl.tensor,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + part * elements.to(tl.int64) + at, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + at % n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def split_count(tiles: int, steps: int) -> int:
    """Into how many parts k goes: a power of two that depends on the shape of the product alone."""
    if target().backend == "interpreter":
        return 2 if steps > 1 else 1
    splits = 1
    while splits < MOST and tiles * splits * 2 <= PROGRAMS and steps >= 2 * splits * LEAST_STEPS:
        splits *= 2
    return splits


def parts_of(out: torch.Tensor, splits: int) -> torch.Tensor:
    """Where the parts' sums go: `out` itself when there is one part, else float32 [splits, M, N]."""
    return out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)


def adding_launch(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> Launch:
    """The launch that adds `parts` [splits, M, N], and `bias` [N], to `out` [M, N]."""
    block = 512
    args = {
        "parts_ptr": parts,
        "bias_ptr": out if bias is None else bias,
        "out_ptr": out,
        "elements": out.numel(),
        "n": out.shape[1],
    }
    constexprs = {"SPLITS": parts.shape[0], "BIAS": bias is not None, "BLOCK": block}
    return Launch(_add_parts, (-(-out.numel() // block),), args, constexprs, num_warps=4)
