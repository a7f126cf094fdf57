"""Parts of a weight that is a file's codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.coded import CodedWeights, Rounding


def rows_of(weights: CodedWeights, rows: slice, count: int) -> CodedWeights:
    """`count` rows: those of `rows`, then such as stand for zeros."""
    missing = count - len(range(*rows.indices(weights.codes.shape[0])))

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor[rows], tensor.new_zeros(missing, tensor.shape[1])])

    codes, scales = part(weights.codes), part(weights.scales)
    assert codes is not None
    assert scales is not None  # a scale of 0 makes any code 0
    return replace(weights, codes=codes, scales=scales, zeros=part(weights.zeros), minima=part(weights.minima))


def columns_of(weights: CodedWeights, columns: slice) -> CodedWeights | None:
    """The inputs `columns`, which has a start and a stop. None where rows are rounded by what only a whole row says."""
    start, stop, group = columns.start, columns.stop, weights.group
    if weights.rounding is not None and not _parted(weights.rounding, start, stop):
        return None
    codes = weights.codes[:, columns].contiguous()
    if weights.order is not None:
        return replace(weights, codes=codes, order=weights.order[columns].clone())
    if weights.scales.shape[1] == 1:
        return replace(weights, codes=codes)
    groups = slice(start // group, -(-stop // group))
    order = None
    if start % group:
        order = (torch.arange(start, stop) // group - groups.start).to(torch.int32)

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:, groups].contiguous()

    scales = part(weights.scales)
    assert scales is not None
    return replace(
        weights, codes=codes, scales=scales, zeros=part(weights.zeros), minima=part(weights.minima), order=order
    )


def _parted(rounding: Rounding, start: int, stop: int) -> bool:
    """Whether inputs `start` to `stop` are rounded the same without the others."""
    if rounding.scale is not None:
        return True
    return rounding.group is not None and start % rounding.group == (stop - start) % rounding.group == 0
