"""Products of 8-bit activations and 8-bit weights on a GPU: int8 (W8A8) and fp8 (e4m3), with scales of either side.

Scales of a side are for the tensor, for each row or channel, or for blocks of 128 x 128 weights and groups of 128
activations (as DeepSeek-V3's checkpoints, 2024). Products of int8 are exact; e4m3 is multiplied as such on chips that
can, elsewhere as float16. With blocks the sums of each 128 are added in float32; with the other scales an sm_90 chip
adds products of e4m3 at less precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.kv_format import decode_e4m3, readable
from kernels.triton.launch import FLOATS, Launch, require, require_dense, target
from kernels.triton.splits import adding_launch, part_of, parts_of, split_count

SCALE_BLOCK = 128


@triton.jit
def tile_of(program: tl.tensor, rows: tl.tensor, columns: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    """(row, column) of a program's tile: GROUP rows of tiles side by side, so that neighbours share what they read."""
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = program % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def _scaled_linear(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    x_scales_ptr: tl.tensor,
    w_scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    INT8: tl.constexpr,
    BLOCKS: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """X_STEP and W_STEP are 1 for a scale a row or channel, 0 for one of the tensor; BLOCKS has its own."""
    row, column = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), 8)
    rows, columns = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    deep = tl.arange(0, BLOCK_K)
    x_at = x_ptr + rows.to(tl.int64)[:, None] * k + deep[None, :]
    w_at = w_ptr + columns.to(tl.int64)[None, :] * k + deep[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INT8 and not BLOCKS else tl.float32)
    first_step, last_step = part_of(tl.cdiv(k, BLOCK_K), tl.program_id(1), SPLITS)
    for step in range(first_step, last_step):
        start = step * BLOCK_K
        x_mask, w_mask = (rows < m)[:, None], (columns < n)[None, :]
        if not EVEN_K:
            x_mask, w_mask = x_mask & (start + deep < k)[None, :], w_mask & (start + deep < k)[:, None]
        x, w = tl.load(x_at + start, mask=x_mask, other=0.0), tl.load(w_at + start, mask=w_mask, other=0.0)
        if x.dtype == tl.uint8:
            x, w = decode_e4m3(x), decode_e4m3(w)
        if BLOCKS:
            part, parts = start // 128, tl.cdiv(k, 128)
            x_scale = tl.load(x_scales_ptr + rows * parts + part, mask=rows < m, other=0.0)
            w_scale = tl.load(w_scales_ptr + columns // 128 * parts + part, mask=columns < n, other=0.0)
            acc += tl.dot(x, w).to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
        else:
            acc = tl.dot(x, w, acc, out_dtype=acc.dtype)
    result = acc.to(tl.float32)
    if not BLOCKS:
        x_scale = tl.load(x_scales_ptr + rows * X_STEP, mask=rows < m, other=0.0)
        w_scale = tl.load(w_scales_ptr + columns * W_STEP, mask=columns < n, other=0.0)
        result = result * x_scale[:, None] * w_scale[None, :]
    if BIAS:
        result += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + (tl.program_id(1) * m + rows).to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


def tile_rows(m: int) -> int:
    """Rows of a tile: no more than the batch needs."""
    return min(128, max(16, int(triton.next_power_of_2(m)))) if target().backend != "interpreter" else 16


def scaled_launches(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scales: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> list[Launch]:
    """The launches of one product, one or with k shared out two; scales of two dimensions mean blocks."""
    (m, k), n = x.shape, w.shape[0]
    blocks = x_scales.dim() == 2
    native = x.dtype is torch.int8 or target().has_fp8
    block_m = tile_rows(m)
    block_n = 128 if block_m > 64 and (native or target().arch != 80) else 64
    block_k = SCALE_BLOCK if native or block_m < 64 else 64
    if native and block_m <= 64 and not blocks:
        block_k = 256  # few rows: the more of a weight's row at once, the better its memory is read
    tiles = -(-m // block_m) * -(-n // block_n)
    splits = split_count(tiles, -(-k // block_k))
    parts = parts_of(out, splits)
    args = {
        "x_ptr": readable(x),
        "w_ptr": readable(w),
        "x_scales_ptr": x_scales,
        "w_scales_ptr": w_scales,
        "bias_ptr": out if bias is None else bias,
        "out_ptr": parts,
        "m": m,
        "n": n,
        "k": k,
    }
    constexprs = {
        "INT8": x.dtype is torch.int8,
        "BLOCKS": blocks,
        "X_STEP": int(x_scales.shape[0] == m and m > 1),
        "W_STEP": int(w_scales.shape[0] == n and n > 1),
        "BIAS": bias is not None and splits == 1,
        "EVEN_K": k % block_k == 0,
        "SPLITS": splits,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
    }
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    stages = 3 if target().backend == "cuda" else 2
    product = Launch(_scaled_linear, (tiles, splits), args, constexprs, num_warps=warps, num_stages=stages)
    return [product] if splits == 1 else [product, adding_launch(parts, bias, out)]


def scaled_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scales: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return x @ w.T with scales, plus bias: [M, N] of `out_dtype`.

    x [M, K] and w [N, K] are codes, both int8 or both float8_e4m3fn. Scales are float32: x_scales [1] or [M] with
    w_scales [1] or [N], or x_scales [M, ceil(K / 128)] with w_scales [ceil(N / 128), ceil(K / 128)]. bias [N]. M may be
    0. Raises InternalError for wrong shapes or dtypes.
    """
    for name, codes in (("x", x), ("w", w)):
        good = codes.dim() == 2 and codes.dtype in (torch.int8, torch.float8_e4m3fn) and codes.is_contiguous()
        require(good and codes.dtype is x.dtype and codes.device == x.device, name, codes, "contiguous codes [rows, K]")
    (m, k), n = x.shape, w.shape[0]
    require(w.shape[1] == k, "w", w, f"[N, {k}]")
    parts = -(-k // SCALE_BLOCK)
    expected = [(m, parts), (-(-n // SCALE_BLOCK), parts)] if x_scales.dim() == 2 else [(m,), (n,)]
    for name, scales, shape in (("x_scales", x_scales, expected[0]), ("w_scales", w_scales, expected[1])):
        single = len(shape) == 1 and scales.numel() == 1
        require_dense(name, scales, (1,) if single else shape, (torch.float32,), x)
    if bias is not None:
        require_dense("bias", bias, (n,), FLOATS, x)
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    for launch in scaled_launches(x, w, x_scales, w_scales, bias, out):
        launch.run()
    return out


def scaled_linear_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scales: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do what `scaled_linear` does, by torch in float64: float32 [M, N]."""
    wide_x, wide_w = x.to(torch.float32).double(), w.to(torch.float32).double()
    if x_scales.dim() == 2:
        at = torch.arange(x.shape[1], device=x.device) // SCALE_BLOCK
        wide_x = wide_x * x_scales.double()[:, at]
        wide_w = wide_w * w_scales.double()[torch.arange(w.shape[0], device=w.device) // SCALE_BLOCK][:, at]
    else:
        wide_x, wide_w = wide_x * x_scales.double()[:, None], wide_w * w_scales.double()[:, None]
    out = wide_x @ wide_w.T
    return (out if bias is None else out + bias.double()).float()
