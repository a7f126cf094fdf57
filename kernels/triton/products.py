"""Quantised weights with what multiplies by them on a GPU: what a loader makes of a weight in 16 bits or float32.

8 bits: a scale an output channel, activations to the same codes with a scale a row at each call (W8A8). 4 bits: weights
alone, rounded to nearest in groups, or as a file has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.int8 import GROUP, ZEROS, GroupWeights
from kernels.triton.group_linear import GroupQuantized, group_linear, pack_pairs
from kernels.triton.quantize import quantize
from kernels.triton.scaled_linear import scaled_linear

LARGE_GROUP = 128


@dataclass(frozen=True, slots=True, eq=False)
class ScaledLinear:
    """Codes [N, K], int8 or float8_e4m3fn, scales float32 [N], bias [N] or None."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in the dtype of x."""
        codes, scales = quantize(x, self.codes.dtype)
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
    table = torch.cat(minima).to(device).bfloat16() if minima else None
    return GroupLinear(GroupQuantized(bits, GROUP, pack_pairs(codes) if bits == 4 else codes, scales, table), bias)
