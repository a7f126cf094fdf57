"""A product whose weights stay as a file's codes: its parts side by side, since each may be stored its own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.coded import CodedLinear, Rounding, coded_linear, round_rows
from kernels.linear import PackedLinear, linear


@dataclass(frozen=True, slots=True, eq=False)
class CodedParts:
    """Weights [Ni, K] whose products are columns of one result, with its bias float32 [N] or None."""

    parts: Sequence[CodedLinear | PackedLinear]
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [T, K] -> float32 [T, N]; rows are rounded first where a part's format says so."""
        total = torch.empty(x.shape[0], sum(part.n for part in self.parts))
        rounded: dict[Rounding | None, Tensor] = {None: x}
        first = 0
        for part in self.parts:
            bias = None if self.bias is None else self.bias[first : first + part.n]
            columns = total[:, first : first + part.n]
            if isinstance(part, CodedLinear):
                if part.rounding is not None and part.rounding not in rounded:
                    rounded[part.rounding] = round_rows(x, part.rounding)
                coded_linear(rounded[part.rounding], part, bias, columns)
            else:
                columns.copy_(linear(x, part, bias))
            first += part.n
        return total

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.parts) + (0 if self.bias is None else self.bias.nbytes)
