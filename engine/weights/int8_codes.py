"""A file's codes as compute int8 holds them: groups of 32 inputs, 4 bits with a minimum or 8 bits without.

What changes: scales become float16 (bfloat16 and float32 ones are rounded to 11 bits), and a group's minimum, which
stands for its zero point, becomes bfloat16 (an error of at most a 64th of a step). Codes stay. What doesn't fit such
groups is rounded again.
"""

from __future__ import annotations

from typing import Final

import torch

from kernels.coded import CodedWeights
from kernels.int8 import GROUP, ZEROS, GroupWeights, quantize_weight

CHUNK_ELEMENTS: Final = 1 << 20
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
    rows, inputs = weights.codes.shape
    step = max(1, CHUNK_ELEMENTS // inputs)
    parts = [
        quantize_weight(weights.chosen(torch.arange(first, min(first + step, rows))).dequantized())
        for first in range(0, rows, step)
    ]
    return GroupWeights(8, torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))
