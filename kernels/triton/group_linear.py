"""Products of 16-bit activations and weights of 4 or 8 bits in groups, on a GPU: the weights alone are quantised.

A weight is d * (code - zero) + m as in `kernels.int8`, with larger groups too. Codes of 4 bits lie in pairs: a byte
holds codes j and j + 16 of its 32, as GGUF's Q4 does, so that both halves of a tile are products of their own and
nothing has to be interleaved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.int8 import ZEROS
from kernels.triton.dequantize import dequantize_launch
from kernels.triton.launch import FLOATS, Launch, require, require_dense, target
from kernels.triton.scaled_linear import tile_of, tile_rows
from kernels.triton.splits import adding_launch, part_of, parts_of, split_count
from tandem.errors import InternalError

BLOCK_B = 64
"""Bytes of a weight row that a step takes."""
MANY_ROWS = 128
"""From here on unpacking the weight anew for each tile of rows costs more than writing it out once, in 16 bits."""


@dataclass(frozen=True, eq=False)
class GroupQuantized:
    """A weight [N, K]: `codes` uint8 [N, K / 2] (4 bits, `pack_pairs`) or [N, K] (8 bits); `scales`, and with them
    `minima` or not, [N, K / group]."""

    bits: int
    group: int
    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    def dequantized(self) -> torch.Tensor:
        """float32 [N, K]."""
        codes = unpack_pairs(self.codes) if self.bits == 4 else self.codes
        groups = torch.arange(self.shape[1], device=codes.device) // self.group
        weight = (codes.float() - ZEROS[self.bits]) * self.scales.float()[:, groups]
        return weight if self.minima is None else weight + self.minima.float()[:, groups]


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, K] of 0 to 15, K a multiple of 32, as bytes [N, K / 2]."""
    low, high = codes.view(codes.shape[0], -1, 2, 16).unbind(2)
    return (low | high << 4).reshape(codes.shape[0], -1)


def unpack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_pairs`."""
    halves = packed.view(packed.shape[0], -1, 16)
    return torch.stack([halves & 15, halves >> 4], 2).reshape(packed.shape[0], -1)


@triton.jit
def _spread(
    table_ptr: tl.tensor,
    columns: tl.tensor,
    n: tl.tensor,
    groups: tl.tensor,
    first: tl.tensor,
    PARTS: tl.constexpr,
    EACH: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_N, PARTS * EACH] float32: each of a tile's PARTS scales, EACH times over."""
    part = first + tl.arange(0, PARTS)
    mask = (columns < n)[:, None] & (part < groups)[None, :]
    values = tl.load(table_ptr + columns[:, None] * groups + part[None, :], mask=mask, other=0.0).to(tl.float32)
    wide = tl.broadcast_to(values[:, :, None], (columns.shape[0], PARTS, EACH))
    return tl.reshape(wide, (columns.shape[0], PARTS * EACH))


@triton.jit
def _signed(codes: tl.tensor, BITS: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Codes less their zero. In bfloat16 a code of 4 bits goes behind the bits of 128, which costs no conversion."""
    if BITS == 4 and tl.bfloat16 == DTYPE:
        return (codes.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    return (codes.to(tl.float32) - (8.0 if BITS == 4 else 128.0)).to(DTYPE)


@triton.jit
def _group_linear(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    minima_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMA: tl.constexpr,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """A tile takes BLOCK_B bytes of each weight row: as many codes, or twice as many of 4 bits.

    It is the transposed product, since weights are many and rows few: [BLOCK_N, BLOCK_M].
    """
    row, column = tile_of(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), 8)
    rows, columns = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    width, groups = k * BITS // 8, k // GROUP
    bytes_at, x_row = tl.arange(0, BLOCK_B), x_ptr + rows.to(tl.int64)[None, :] * k
    codes_row = codes_ptr + columns.to(tl.int64)[:, None] * width
    EACH: tl.constexpr = GROUP * BITS // 8  # bytes of a group
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first_step, last_step = part_of(tl.cdiv(width, BLOCK_B), tl.program_id(1), SPLITS)
    for step in range(first_step, last_step):
        start = step * BLOCK_B
        at = start + bytes_at
        first = at // 16 * 32 + at % 16 if BITS == 4 else at
        x_mask = (at < width)[:, None] & (rows < m)[None, :]
        codes = tl.load(codes_row + at[None, :], mask=(columns < n)[:, None] & (at < width)[None, :], other=0)
        x = tl.load(x_row + first[:, None], mask=x_mask, other=0.0)
        low = _signed(codes & 15 if BITS == 4 else codes, BITS, DTYPE)
        if BITS == 4:
            high = _signed(codes >> 4, BITS, DTYPE)
            x_high = tl.load(x_row + first[:, None] + 16, mask=x_mask, other=0.0)
        if EACH >= BLOCK_B:  # one group: its scale is a factor of the product
            product = tl.dot(low, x, input_precision="ieee")
            if BITS == 4:
                product = tl.dot(high, x_high, product, input_precision="ieee")
            scale_at = columns * groups + start // EACH
            acc += product * tl.load(scales_ptr + scale_at, mask=columns < n, other=0.0).to(tl.float32)[:, None]
            if MINIMA:
                total = tl.sum(x.to(tl.float32), 0)
                if BITS == 4:
                    total += tl.sum(x_high.to(tl.float32), 0)
                minimum = tl.load(minima_ptr + scale_at, mask=columns < n, other=0.0).to(tl.float32)
                acc += minimum[:, None] * total[None, :]
        else:
            scale = _spread(scales_ptr, columns, n, groups, start // EACH, BLOCK_B // EACH, EACH)
            weight = low.to(tl.float32) * scale
            if MINIMA:
                minimum = _spread(minima_ptr, columns, n, groups, start // EACH, BLOCK_B // EACH, EACH)
                weight += minimum
            acc = tl.dot(weight.to(DTYPE), x, acc, input_precision="ieee")
            if BITS == 4:
                weight = high.to(tl.float32) * scale
                if MINIMA:
                    weight += minimum
                acc = tl.dot(weight.to(DTYPE), x_high, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)[:, None]
    out_at = out_ptr + (tl.program_id(1) * m + rows).to(tl.int64)[None, :] * n + columns[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(columns < n)[:, None] & (rows < m)[None, :])


def group_launches(
    x: torch.Tensor, weight: GroupQuantized, bias: torch.Tensor | None, out: torch.Tensor
) -> list[Launch]:
    """The launches of one product: one, or with k shared out two."""
    (m, k), n = x.shape, weight.codes.shape[0]
    block_m = min(64, tile_rows(m))
    block_n = 128 if target().backend != "interpreter" else 32
    tiles = -(-m // block_m) * -(-n // block_n)
    splits = split_count(tiles, -(-k * weight.bits // 8 // BLOCK_B))
    parts = parts_of(out, splits)
    args = {
        "x_ptr": x,
        "codes_ptr": weight.codes,
        "scales_ptr": weight.scales,
        "minima_ptr": weight.scales if weight.minima is None else weight.minima,
        "bias_ptr": out if bias is None else bias,
        "out_ptr": parts,
        "m": m,
        "n": n,
        "k": k,
    }
    constexprs = {
        "BITS": weight.bits,
        "GROUP": weight.group,
        "MINIMA": weight.minima is not None,
        "BIAS": bias is not None and splits == 1,
        "SPLITS": splits,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_B": BLOCK_B,
    }
    stages = 4 if target().backend == "cuda" else 2
    product = Launch(_group_linear, (tiles, splits), args, constexprs, num_warps=8, num_stages=stages)
    return [product] if splits == 1 else [product, adding_launch(parts, bias, out)]


def group_linear(x: torch.Tensor, weight: GroupQuantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [M, K] (16 bits or float32) times the weight, plus bias [N]: [M, N] in the dtype of x. M may be 0.

    The group is 32, 64, or a multiple of 128, and K a multiple of it. Raises InternalError for wrong shapes or dtypes.
    """
    if weight.bits not in ZEROS or not (weight.group in (32, 64) or (weight.group and weight.group % 128 == 0)):
        raise InternalError(f"{weight.bits} bits in groups of {weight.group}: allowed are 4 and 8, 32, 64 and n * 128")
    n, k = weight.shape
    require(x.dim() == 2 and x.dtype in FLOATS and x.is_contiguous() and x.shape[1] == k, "x", x, f"[M, {k}]")
    require(k % weight.group == 0, "x", x, f"of a width that is a multiple of {weight.group}")
    require_dense("codes", weight.codes, tuple(weight.codes.shape), (torch.uint8,), x)
    for name, table in (("scales", weight.scales), ("minima", weight.minima)):
        if table is not None:
            require_dense(name, table, (n, k // weight.group), FLOATS, x)
    if bias is not None:
        require_dense("bias", bias, (n,), FLOATS, x)
    if x.shape[0] >= MANY_ROWS:
        return torch.nn.functional.linear(x, written_out(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    for launch in group_launches(x, weight, bias, out):
        launch.run()
    return out


def written_out(weight: GroupQuantized, dtype: torch.dtype) -> torch.Tensor:
    """The weight in `dtype`, [N, K]: for the time of one product."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    dequantize_launch(weight.codes, weight.scales, weight.minima, weight.bits, weight.group, out).run()
    return out


def group_linear_reference(x: torch.Tensor, weight: GroupQuantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Do what `group_linear` does, by torch in float64: float32 [M, N]."""
    out = x.double() @ weight.dequantized().double().T
    return (out if bias is None else out + bias.double()).float()
