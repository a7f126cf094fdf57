"""Quantised weights with what multiplies by them on a GPU: what a loader makes of a weight in 16 bits or float32.

8 bits: a scale an output channel, activations to the same codes with a scale a row at each call (W8A8); or as a file
has them, with a scale for blocks or activations' own scale, too. 4 bits: weights alone, rounded to nearest in groups,
or as a file has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.coded import CodedWeights
from kernels.int8 import GROUP, ZEROS, GroupWeights
from kernels.triton.group_linear import GroupQuantized, group_linear, pack_pairs
from kernels.triton.quantize import quantize
from kernels.triton.scaled_linear import SCALE_BLOCK, scaled_linear

LARGE_GROUP = 128


@dataclass(frozen=True, slots=True, eq=False)
class ScaledLinear:
    """Codes [N, K], int8 or float8_e4m3fn, scales float32 [N], bias [N] or None.

    Scales [ceil(N / 128), ceil(K / 128)] are for blocks, and then activations have a scale for 128 of a row.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None = None
    fixed: Tensor | None = None
    """float32 [1], the scale of all activations; None: found for each row."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in the dtype of x."""
        group = SCALE_BLOCK if self.scales.dim() == 2 else None
        codes, scales = quantize(x, self.codes.dtype, group=group, scale=self.fixed)
        return scaled_linear(codes, self.codes, scales, self.scales, self.bias, x.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class GroupLinear:
    """A weight of 4 or 8 bits in groups, bias [N] or None."""

    weight: GroupQuantized
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in the dtype of x."""
        return group_linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tables = [t for t in (self.weight.scales, self.weight.minima, self.bias) if t is not None]
        return self.weight.codes.nbytes + sum(table.nbytes for table in tables)


class Product(Protocol):
    """A weight [N, K] with its bias."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in the dtype of x."""


@dataclass(frozen=True, slots=True, eq=False)
class SideBySide:
    """Products [Ni, K] whose results are columns of one: parts that are stored in different ways."""

    parts: Sequence[Product]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in the dtype of x."""
        return torch.cat([part(x) for part in self.parts], dim=1)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.parts)


def scaled_product(weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> ScaledLinear:
    """Round weight [N, K] to `dtype` (int8 or float8_e4m3fn), a scale a row."""
    return ScaledLinear(*quantize(weight, dtype), bias)


def group_product(weight: Tensor, bias: Tensor | None = None) -> GroupLinear:
    """Round weight [N, K] to 4 bits, symmetric, in groups of 128 columns, or of 32 where K is no multiple of that."""
    rows, width = weight.shape
    group = LARGE_GROUP if width % LARGE_GROUP == 0 else GROUP
    parts = weight.float().view(rows, -1, group)
    scales = (parts.abs().amax(-1) / (ZEROS[4] - 1)).half()
    safe = scales.float().where(scales > 0, 1.0)[..., None]
    codes = (parts / safe).round().clamp(1 - ZEROS[4], ZEROS[4] - 1) + ZEROS[4]
    packed = pack_pairs(codes.to(torch.uint8).view(rows, width))
    return GroupLinear(GroupQuantized(4, group, packed, scales), bias)


def coded_product(parts: list[GroupWeights], device: torch.device, bias: Tensor | None = None) -> GroupLinear:
    """The weights of one file's codes, all of one number of bits, one behind the other along N."""
    bits = parts[0].bits
    codes = torch.cat([part.codes for part in parts]).to(device)
    scales = torch.cat([part.scales for part in parts]).to(device).half()
    minima = [part.minima for part in parts if part.minima is not None]
    # Symmetric codes have minima of zeros, which cost a sum for each group.
    table = torch.cat(minima).to(device).bfloat16() if any(bool(part.any()) for part in minima) else None
    return GroupLinear(GroupQuantized(bits, GROUP, pack_pairs(codes) if bits == 4 else codes, scales, table), bias)


def stored_product(
    parts: Sequence[CodedWeights], device: torch.device, bias: Tensor | None = None
) -> ScaledLinear | None:
    """Codes of 8 bits as one file has them, parts one behind the other along N; None: no product here takes them.

    Activations are rounded as the format says. FP8 formats that leave that to whoever computes have them rounded too,
    with a scale for each row, or for 128 of one where weights come in blocks: no GPU multiplies FP8 otherwise.
    """
    first = parts[0]
    fixed = None if first.rounding is None else first.rounding.scale
    scales = [_table(part) for part in parts]
    found = [table for table in scales if table is not None]
    if len(found) < len(parts) or len({(part.fp8, part.rounding, part.group) for part in parts}) > 1:
        return None
    blocks = found[0].dim() == 2
    if blocks and any(part.codes.shape[0] % SCALE_BLOCK for part in parts[:-1]):
        return None  # the next part would begin amid a block
    codes = torch.cat([part.codes for part in parts]).to(device)
    return ScaledLinear(
        codes.view(torch.float8_e4m3fn) if first.fp8 else (codes ^ 128).view(torch.int8),
        torch.cat(found).to(device),
        bias,
        None if fixed is None else torch.tensor([fixed], device=device),
    )


def _table(weights: CodedWeights) -> Tensor | None:
    """The scales as `scaled_linear` takes them, float32; None: the weight is no such."""
    (_, inputs), scales, rounding = weights.codes.shape, weights.scales.float(), weights.rounding
    odd = any(part is not None for part in (weights.order, weights.zeros, weights.minima, weights.table))
    kind = "fp8" if weights.fp8 else "int8"
    if odd or weights.bits != 8 or (kind if rounding is None else rounding.kind) != kind:
        return None
    if rounding is None and not weights.fp8:
        return None
    if weights.group == inputs:
        return scales[:, 0].contiguous() if rounding is None or rounding.group in (None, inputs) else None
    if weights.group != SCALE_BLOCK or (rounding is not None and rounding.group != SCALE_BLOCK):
        return None
    table = scales[::SCALE_BLOCK]
    spread = table.repeat_interleave(SCALE_BLOCK, dim=0)[: scales.shape[0]]
    return table.contiguous() if torch.equal(spread, scales) else None
