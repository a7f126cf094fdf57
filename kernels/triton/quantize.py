"""Activations quantised on a GPU for products of 8 bits: int8, or e4m3 in the bits of torch's float8_e4m3fn.

One scale for the tensor (given), one for each row, or one for each group of a row's columns (found: largest magnitude
over 127 or 448).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.kv_format import LARGEST_E4M3, encode_e4m3
from kernels.triton.launch import FLOATS, Launch, require, require_dense

MAX_GROUP = 1 << 15
CODES = {torch.int8: 127.0, torch.float8_e4m3fn: LARGEST_E4M3}


@triton.jit
def _quantize(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    width: tl.tensor,
    group: tl.tensor,
    GIVEN: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * group + tl.arange(0, BLOCK)
    mask = (tl.arange(0, BLOCK) < group) & (at < width)
    x = tl.load(x_ptr + row * width + at, mask=mask, other=0.0).to(tl.float32)
    if GIVEN:
        scale = tl.load(scales_ptr)
    else:
        scale = tl.max(tl.abs(x), 0) / (127.0 if INT8 else 448.0)
        tl.store(scales_ptr + row * tl.num_programs(1) + part, scale)
    x = x / tl.where(scale > 0, scale, 1.0)
    if INT8:
        x = tl.where(x >= 0, tl.floor(x + 0.5), tl.ceil(x - 0.5))
        codes = tl.minimum(tl.maximum(x, -127.0), 127.0).to(tl.int8)
    else:
        codes = encode_e4m3(x)
    tl.store(codes_ptr + row * width + at, codes, mask=mask)


def quantize_launch(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group: int, given: bool) -> Launch:
    """The launch that quantises x [M, K] in groups of columns."""
    rows, width = x.shape
    block = int(triton.next_power_of_2(group))
    is_int8 = codes.dtype is torch.int8
    args = {
        "x_ptr": x,
        "codes_ptr": codes if is_int8 else codes.view(torch.uint8),
        "scales_ptr": scales,
        "width": width,
        "group": group,
    }
    constexprs = {"GIVEN": given, "INT8": is_int8, "BLOCK": block}
    return Launch(_quantize, (rows, -(-width // group)), args, constexprs, num_warps=min(16, max(1, block // 512)))


def quantize(
    x: torch.Tensor, dtype: torch.dtype, *, group: int | None = None, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [M, K] of `dtype` (int8 or float8_e4m3fn) and float32 scales of x [M, K], 16 bits or float32.

    Scales are [M], with `group` columns a scale [M, ceil(K / group)], or `scale` float32 [1] itself when given. Raises
    InternalError for wrong shapes or dtypes.
    """
    wide = group or x.shape[-1]
    good = x.dim() == 2 and x.dtype in FLOATS and x.is_contiguous() and 0 < wide <= MAX_GROUP
    require(good, "x", x, f"contiguous [M, K], groups of at most {MAX_GROUP}")
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    require(dtype in CODES, "codes", codes, "int8 or float8_e4m3fn")
    if scale is not None:
        require_dense("scale", scale, (1,), (torch.float32,), x)
        wide = min(x.shape[1], 1024)
    shape = (x.shape[0],) if group is None else (x.shape[0], -(-x.shape[1] // group))
    scales = torch.empty(shape, dtype=torch.float32, device=x.device) if scale is None else scale
    quantize_launch(x, codes, scales, wide, scale is not None).run()
    return codes, scales


def quantize_reference(
    x: torch.Tensor, dtype: torch.dtype, group: int | None = None, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `quantize` does, by torch."""
    x, (rows, width) = x.float(), x.shape
    wide = group or width
    parts = torch.nn.functional.pad(x, (0, -width % wide)).view(rows, -1, wide)
    scales = parts.abs().amax(-1) / CODES[dtype] if scale is None else scale.expand(rows, parts.shape[1])
    values = parts / scales.where(scales > 0, 1.0)[..., None]
    if dtype is torch.int8:
        values = values.sign() * (values.abs() + 0.5).floor()
    codes = values.clamp(-CODES[dtype], CODES[dtype]).view(rows, -1)[:, :width].to(dtype)
    found = scale if scale is not None else scales if group else scales[:, 0]
    return codes, found
