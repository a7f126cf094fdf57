"""Products by torch's own library on any device, in the dtype of the weights (cuBLAS, hipBLASLt; oneDNN in tests)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    """A weight [N, K] in the activations' dtype, with its bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None
    wide: bool = False
    """Results in float32: for logits, whose ties 16 bits would make."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in the dtype of x, or float32 when `wide`."""
        if not self.wide or x.dtype is torch.float32:
            return functional.linear(x, self.weight, self.bias)
        if x.is_cuda and torch.version.hip is None:  # elsewhere the product has the dtype of its inputs
            out = torch.mm(x, self.weight.t(), out_dtype=torch.float32)
        else:
            out = functional.linear(x.float(), self.weight.float())
        return out if self.bias is None else out + self.bias

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
