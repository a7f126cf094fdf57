"""A quantised layer's tensors as `CodedWeights`: each packing has a reader that says what it expects by name and shape.

Nothing here holds more than one layer's weight, at 8 bits a code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from engine.weights.quantized import INVERSE, Packing, Scheme
from engine.weights.quantized_codes import WORD, packed_words, raise_zeros, unpack, unpack_awq
from engine.weights.quantized_parts import Parts
from engine.weights.quantized_table import TABLE_SUFFIXES, read_table, table_shape
from kernels.coded import FP8, CodedWeights, Rounding
from tandem.errors import ModelFormatError

SCALES: Final = (torch.float16, torch.bfloat16, torch.float32)
ROW_SCALES: Final = ("input_scale", "activation_scale")
SUFFIXES: Final = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("weight_scale_inv", *ROW_SCALES),
    *("SCB", "weight_format"),
    *(f"_weight_{part}" for part in ("qdata", "scale", "zero_point", "act_pre_scale")),
    *(f"_weight_act_quant_{part}" for part in ("scale", "zero_point")),
    *TABLE_SUFFIXES,
)
"""Tensors beside a layer's codes, and the codes where they have a name of their own."""


def coded_shape(parts: Parts, scheme: Scheme) -> tuple[int, int]:
    """[N, K] of the weight that the layer's codes stand for. Raises ModelFormatError when they are missing or odd."""
    if scheme.packing == "plain":
        rows, inputs = parts.matrix(scheme.codes_name, (FP8 if scheme.fp8 else torch.int8,)).shape
        return rows, inputs
    if scheme.packing == "table":
        return table_shape(parts, scheme)
    if scheme.packing == "packed":
        rows, inputs = (int(side) for side in parts.take("weight_shape", (torch.int64, torch.int32), (2,)))
        parts.take("weight_packed", (torch.int32,), (rows, packed_words(inputs, scheme.bits)))
        return rows, inputs
    first, second = parts.matrix("qweight", (torch.int32,)).shape
    if scheme.packing == "awq_gemm":
        return second * WORD // 4, first
    if scheme.packing == "awq_gemv":
        return first, second * WORD // 4
    return second, first * WORD // scheme.bits


def read_weight(parts: Parts, scheme: Scheme) -> CodedWeights:
    """The layer's weight. Raises ModelFormatError naming the tensor that is missing, wrong or one too many."""
    weights = _READERS[scheme.packing](parts, scheme)
    # Rows of the format fp8 stay as they are: see `quantized_config`.
    idle = ROW_SCALES if scheme.scale_name == INVERSE else ()
    parts.refuse_others([suffix for suffix in SUFFIXES if suffix not in idle])
    return weights


def _group(scheme: Scheme, inputs: int) -> tuple[int, int]:
    """Inputs of a group, and the number of groups."""
    group = inputs if scheme.group is None else min(scheme.group, inputs)
    return group, -(-inputs // group)


def _gptq(parts: Parts, scheme: Scheme) -> CodedWeights:
    (rows, inputs), bits = coded_shape(parts, scheme), scheme.bits
    group, groups = _group(scheme, inputs)
    scales = parts.take("scales", SCALES, (groups, rows))
    words = parts.take("qzeros", (torch.int32,), (groups, packed_words(rows, bits)))
    zeros = unpack(words, bits, rows) if scheme.packing == "gptq_v2" else raise_zeros(words, bits, rows)
    codes = unpack(parts.take("qweight", (torch.int32,)).T, bits, inputs)
    order = _order(parts, "g_idx", scheme, inputs, groups)
    return _integers(codes, scales.T, zeros.T, group, bits, order)


def _awq_gemm(parts: Parts, scheme: Scheme) -> CodedWeights:
    rows, inputs = coded_shape(parts, scheme)
    group, groups = _group(scheme, inputs)
    scales = parts.take("scales", SCALES, (groups, rows))
    zeros = unpack_awq(parts.take("qzeros", (torch.int32,), (groups, rows // 8)))
    codes = unpack_awq(parts.take("qweight", (torch.int32,))).T
    return _integers(codes, scales.T, zeros.T, group, 4, None)


def _awq_gemv(parts: Parts, scheme: Scheme) -> CodedWeights:
    rows, inputs = coded_shape(parts, scheme)
    group, groups = _group(scheme, inputs)
    # The tool pads the words of a row so that a warp reads whole ones: less with larger groups.
    multiple = 1 if group >= 128 else 128 // group
    words = -(-packed_words(groups, 4) // multiple) * multiple
    scales = parts.take("scales", SCALES, (rows, words * 8))[:, :groups]
    zeros = unpack(parts.take("qzeros", (torch.int32,), (rows, words)), 4, groups)
    return _integers(unpack(parts.take("qweight", (torch.int32,)), 4, inputs), scales, zeros, group, 4, None)


def _packed(parts: Parts, scheme: Scheme) -> CodedWeights:
    (rows, inputs), bits = coded_shape(parts, scheme), scheme.bits
    group, groups = _group(scheme, inputs)
    scales = _row_scales(parts, scheme, rows, groups)
    zeros = None
    if parts.has("weight_zero_point") or not scheme.symmetric:
        words = parts.take("weight_zero_point", (torch.int32,), (packed_words(rows, bits), groups))
        zeros = unpack(words.T, bits, rows).T
    codes = unpack(parts.take("weight_packed", (torch.int32,)), bits, inputs)
    order = _order(parts, "weight_g_idx", scheme, inputs, groups)
    weights = _integers(codes, scales, zeros, group, bits, order)
    return _with_rounding(weights, parts, scheme)


def _plain(parts: Parts, scheme: Scheme) -> CodedWeights:
    rows, inputs = coded_shape(parts, scheme)
    codes = parts.take(scheme.codes_name, (FP8 if scheme.fp8 else torch.int8,)).view(torch.uint8)
    if scheme.steps != 1 and int(parts.take("weight_format", (torch.uint8,), (), (1,))):
        raise ModelFormatError(f"{parts.source}: tensor {parts.layer}.weight_format is not 0; expected rows in order")
    if scheme.block is not None:
        scales, group = _block_scales(parts, scheme, rows, inputs)
        order = None
    else:
        group, groups = _group(scheme, inputs)
        scales = _row_scales(parts, scheme, rows, groups)
        order = _order(parts, "weight_g_idx", scheme, inputs, groups)
    if scheme.fp8:
        weights = CodedWeights(_own(codes), _own(scales), group, fp8=True, order=order)
    else:
        zeros = _plain_zeros(parts, scheme, scales.shape)
        weights = _integers(codes ^ 128, scales, zeros, group, 8, order)
    return _with_rounding(weights, parts, scheme)


def _block_scales(parts: Parts, scheme: Scheme, rows: int, inputs: int) -> tuple[Tensor, int]:
    """Scales [rows, groups], and the inputs of a group."""
    assert scheme.block is not None
    high, wide = min(scheme.block[0], rows), min(scheme.block[1], inputs)
    blocks = parts.take(scheme.scale_name, SCALES, (-(-rows // high), -(-inputs // wide)))
    return blocks.repeat_interleave(high, dim=0)[:rows], wide


def _plain_zeros(parts: Parts, scheme: Scheme, shape: torch.Size) -> Tensor | None:
    """Zeros counted from -128, as codes are; None: all are 0."""
    if not parts.has(scheme.zeros_name) and scheme.symmetric:
        return None
    stored = parts.take(scheme.zeros_name, (torch.int8,), tuple(shape), (1,), (1, 1))
    return (stored.view(torch.uint8) ^ 128).expand(shape)


def _row_scales(parts: Parts, scheme: Scheme, rows: int, groups: int) -> Tensor:
    """Scales [rows, groups]."""
    if scheme.per_tensor:
        name = scheme.scale_name if parts.has(scheme.scale_name) else "weight_scale"
        return parts.take(name, SCALES, (), (1,), (1, 1), (rows, 1)).view(-1, 1).expand(rows, 1)
    shapes = ((rows, groups),) if groups > 1 else ((rows, 1), (rows,))
    scales = parts.take(scheme.scale_name, SCALES, *shapes).view(rows, groups)
    return scales if scheme.steps == 1 else scales.float() / scheme.steps


def _order(parts: Parts, suffix: str, scheme: Scheme, inputs: int, groups: int) -> Tensor | None:
    """The group of each input; None: they are in order of their place."""
    if not parts.has(suffix) and not scheme.ordered:
        return None
    order = parts.take(suffix, (torch.int32,), (inputs,))
    group = _group(scheme, inputs)[0]
    if bool((order < 0).all()) or torch.equal(order, torch.arange(inputs, dtype=torch.int32) // group):
        return None
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= groups:
        problem = f"names groups {low} to {high}; expected 0 to {groups - 1}"
        raise ModelFormatError(f"{parts.source}: tensor {parts.layer}.{suffix} {problem}")
    return order


def _integers(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bits: int, order: Tensor | None
) -> CodedWeights:
    """Zeros that are all the middle are left out: products without them are shorter."""
    if zeros is not None and bool((zeros == 1 << bits >> 1).all()):
        zeros = None
    zeros = None if zeros is None else zeros.contiguous()
    return CodedWeights(codes.contiguous(), _own(scales), group, bits, zeros=zeros, order=order)


def _own(tensor: Tensor) -> Tensor:
    """Dense memory of its own: the file's map may go."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _with_rounding(weights: CodedWeights, parts: Parts, scheme: Scheme) -> CodedWeights:
    activations = scheme.activations
    if activations is None:
        return weights
    inputs, group = weights.codes.shape[1], activations.group
    if group is not None and inputs % group:
        problem = f"rows of {inputs} inputs do not divide into groups of {group}, by which they are to be quantised"
        raise ModelFormatError(f"{parts.source}: {parts.layer}: {problem}")
    scale = None if activations.dynamic else parts.number("input_scale", SCALES)
    rounding = Rounding(activations.kind, activations.group, scale, activations.by_inverse)
    return replace(weights, rounding=rounding)


_READERS: Final[Mapping[Packing, Callable[[Parts, Scheme], CodedWeights]]] = {
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq_gemm": _awq_gemm,
    "awq_gemv": _awq_gemv,
    "packed": _packed,
    "plain": _plain,
    "table": read_table,
}
