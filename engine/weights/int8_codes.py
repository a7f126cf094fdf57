"""A file's codes as compute int8 holds them: groups of 32 inputs, 4 bits with a minimum or 8 bits without.

What changes: scales become float16 (bfloat16 and float32 ones are rounded to 11 bits), and a group's minimum, which
stands for its zero point, becomes bfloat16 (an error of at most a 64th of a step). Codes stay. What doesn't fit such
groups is rounded again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from kernels.coded import CodedWeights
from kernels.int8 import GROUP, ZEROS, GroupWeights, quantize_weight

CHUNK_ELEMENTS: Final = 1 << 16
"""Of a weight that are float32 at a time while it is rounded again."""


def group_weights(weights: CodedWeights) -> GroupWeights | None:
    """The same weight in groups of 32; None for FP8, ordered inputs, odd groups, 8 bits with zeros."""
    inputs = weights.codes.shape[1]
    if weights.fp8 or weights.order is not None or (weights.group % GROUP and weights.group < inputs):
        return None
    if weights.table is not None or weights.minima is not None or (weights.bits == 8 and weights.zeros is not None):
        return None
    where = torch.arange(0, inputs, GROUP) // weights.group
    scales = weights.scales.float()[:, where].contiguous()
    if weights.bits == 8:
        return GroupWeights(8, weights.codes, scales)
    middle = float(1 << weights.bits >> 1)
    zeros = middle if weights.zeros is None else weights.zeros.float()[:, where]
    return GroupWeights(4, weights.codes, scales, (scales * (ZEROS[4] - zeros)).contiguous())


def rounded_again(weights: CodedWeights) -> GroupWeights:
    """The same weight rounded to 8 bits in groups of 32, some rows at a time: never all of it is float32."""
    return _rounded(weights.codes.shape, lambda rows: weights.chosen(rows).dequantized())


def rounded(weight: Tensor) -> GroupWeights:
    """A weight [N, K] of plain numbers as `rounded_again` has it."""
    return _rounded(weight.shape, lambda rows: weight[rows])


def _rounded(shape: tuple[int, ...], some: Callable[[Tensor], Tensor]) -> GroupWeights:
    """`some(rows)` gives rows int64 of the weight."""
    rows, inputs = shape
    codes = torch.empty(rows, inputs, dtype=torch.uint8)
    scales = torch.empty(rows, -(-inputs // GROUP))
    step = max(1, CHUNK_ELEMENTS // inputs)
    for first in range(0, rows, step):
        part = quantize_weight(some(torch.arange(first, min(first + step, rows))))
        codes[first : first + step], scales[first : first + step] = part.codes, part.scales
    return GroupWeights(8, codes, scales)
