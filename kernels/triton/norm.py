"""RMS normalisation on a GPU: of rows, with an optional residual sum, and of heads (q/k norm).

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). One program a row, sums in float32; a row's
bits depend on that row only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.norm import rms_norm_reference
from kernels.triton.launch import FLOATS, Launch, require, require_dense

MAX_WIDTH = 1 << 15


@triton.jit
def _rms_norm(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program (row, head): the heads of a row lie side by side."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    mask = at < width
    raw = tl.load(x_ptr + row * x_stride + head * width + at, mask=mask, other=0.0)
    x = raw.to(tl.float32)
    if ADD:
        residual = residual_ptr + row * width + at
        total = (x + tl.load(residual, mask=mask, other=0.0).to(tl.float32)).to(raw.dtype)
        tl.store(residual, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + head * width + at, (x * scale * weight).to(raw.dtype), mask=mask)


def norm_launch(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> Launch:
    """The launch for x [rows, heads, width], each row's heads dense."""
    rows, heads, width = x.shape
    block = int(triton.next_power_of_2(width))
    return Launch(
        _rms_norm,
        (rows, heads),
        {
            "x_ptr": x,
            "residual_ptr": x if residual is None else residual,
            "weight_ptr": weight,
            "out_ptr": out,
            "x_stride": x.stride(0),
            "out_stride": out.stride(0),
            "width": width,
            "eps": eps,
        },
        {"ADD": residual is not None, "BLOCK": block},
        num_warps=min(16, max(1, block // 512)),
    )


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight for each row of x [rows, width] (16 bits or float32).

    weight [width]. With `residual` like x: residual += x in place, rounded to its dtype, and the sum is what gets
    normalised. The result goes to `out` if given (it may be `x`). Raises InternalError for wrong shapes or dtypes.
    """
    good = x.dim() == 2 and x.dtype in FLOATS and x.is_contiguous() and x.shape[1] <= MAX_WIDTH
    require(good, "x", x, f"contiguous [rows, width <= {MAX_WIDTH}]")
    require_dense("weight", weight, (x.shape[1],), FLOATS, x)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            require_dense(name, tensor, tuple(x.shape), (x.dtype,), x)
    out = torch.empty_like(x) if out is None else out
    norm_launch(x[:, None], weight, out[:, None], eps, residual).run()
    return out


def rms_norm_heads(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Normalise each head of each row: x [rows, heads, dim], weight [dim], result like x.

    x and `out` may be slices of wider rows, as `qkv.view(T, Hq + 2 * Hkv, D)[:, :Hq]`: only a row's heads must be
    dense. `out` may be `x` itself. Raises InternalError for wrong shapes or dtypes.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    for name, tensor in (("x", x), ("out", out)):
        good = tensor.dim() == 3 and tensor.dtype in FLOATS and tensor.stride()[1:] == (tensor.shape[2], 1)
        require(good, name, tensor, "[rows, heads, dim], each row's heads dense")
    good = out.shape == x.shape and out.dtype is x.dtype and out.device == x.device
    require(good, "out", out, f"{x.dtype} {tuple(x.shape)} on {x.device}")
    require_dense("weight", weight, (x.shape[2],), FLOATS, x)
    norm_launch(x, weight, out, eps, None).run()
    return out


def norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Do what `rms_norm` does, by torch: float32, and the residual sum rounded to its dtype."""
    if residual is not None:
        x = residual.copy_(x.float() + residual.float())
    return rms_norm_reference(x.float(), weight.float(), eps)
