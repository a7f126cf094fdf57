"""Weights of 4 or 8 bits in groups, written out in 16 bits: for one product over many rows, which then is torch's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.launch import Launch


@triton.jit
def _dequantize(
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    minima_ptr: tl.tensor,
    out_ptr: tl.tensor,
    k: tl.tensor,
    width: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK bytes of one weight row."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    codes = tl.load(codes_ptr + row * width + at, mask=mask, other=0)
    first = at // 16 * 32 + at % 16 if BITS == 4 else at
    part = row * (k // GROUP) + first // GROUP  # a byte's two codes are of one group
    scale = tl.load(scales_ptr + part, mask=mask, other=0.0).to(tl.float32)
    least = tl.load(minima_ptr + part, mask=mask, other=0.0).to(tl.float32) if MINIMA else 0.0
    low = (codes & 15).to(tl.float32) - 8.0 if BITS == 4 else codes.to(tl.float32) - 128.0
    tl.store(out_ptr + row * k + first, (low * scale + least).to(out_ptr.dtype.element_ty), mask=mask)
    if BITS == 4:
        high = (codes >> 4).to(tl.float32) - 8.0
        tl.store(out_ptr + row * k + first + 16, (high * scale + least).to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_launch(
    codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor | None, bits: int, group: int, out: torch.Tensor
) -> Launch:
    """The launch that fills out [N, K] from a `GroupQuantized`'s parts."""
    n, k = out.shape
    width = codes.shape[1]
    args = {
        "codes_ptr": codes,
        "scales_ptr": scales,
        "minima_ptr": scales if minima is None else minima,
        "out_ptr": out,
        "k": k,
        "width": width,
    }
    block = min(1024, int(triton.next_power_of_2(width)))
    constexprs = {"BITS": bits, "GROUP": group, "MINIMA": minima is not None, "BLOCK": block}
    return Launch(_dequantize, (-(-width // block), n), args, constexprs, num_warps=4)
