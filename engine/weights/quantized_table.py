"""bitsandbytes' 4-bit weights: codes of a table, scaled by the block, whose scales may be quantised themselves.

Scales of QLoRA's double quantisation (Dettmers et al., 2023) are read as float32.
"""

from __future__ import annotations

import json
from typing import Final

import torch
from torch import Tensor

from engine.weights.fields import Fields
from engine.weights.quantized import Scheme
from engine.weights.quantized_parts import Parts
from kernels.coded import CodedWeights
from tandem.errors import ModelFormatError

BLOCK: Final = 64
"""Weights that share a scale where nothing else is said."""
_STATE: Final = "weight.quant_state.bitsandbytes__"
TABLE_SUFFIXES: Final = (
    *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *(f"{_STATE}nf4", f"{_STATE}fp4"),
)


def table_shape(parts: Parts, scheme: Scheme) -> tuple[int, int]:
    """[N, K] as the layer's quant_state says. Raises ModelFormatError."""
    return _sides(_state(parts, scheme))


def read_table(parts: Parts, scheme: Scheme) -> CodedWeights:
    """The layer's weight. Raises ModelFormatError naming the tensor that is missing or wrong."""
    state = _state(parts, scheme)
    (rows, inputs), block = _sides(state), state.integer("blocksize", BLOCK)
    if inputs % block or inputs % 2:
        raise state.error("blocksize", f"blocks of {block} do not fit rows of {inputs}")
    data = parts.take("weight", (torch.uint8,), (rows * inputs // 2, 1), (1, rows * inputs // 2))
    codes = torch.stack([data.view(-1) >> 4, data.view(-1) & 15], dim=-1).view(rows, inputs)
    table = parts.take("weight.quant_map", (torch.float32,), (16,)).clone()
    scales = _scales(parts, state, rows * inputs // block).view(rows, inputs // block)
    return CodedWeights(codes, scales, block, 4, table=table)


def _scales(parts: Parts, state: Fields, count: int) -> Tensor:
    """One float32 a block."""
    if not parts.has("weight.nested_absmax"):
        return parts.take("weight.absmax", (torch.float32,), (count,)).clone()
    wide = state.integer("nested_blocksize", 256)
    codes = parts.take("weight.absmax", (torch.uint8,), (count,))
    table = parts.take("weight.nested_quant_map", (torch.float32,), (256,))
    outer = parts.take("weight.nested_absmax", (torch.float32,), (-(-count // wide),))
    return table[codes.long()] * outer[torch.arange(count) // wide] + state.number("nested_offset")


def _state(parts: Parts, scheme: Scheme) -> Fields:
    suffix = _STATE + scheme.table
    encoded = parts.take(suffix, (torch.uint8,))
    source = f"{parts.source}: tensor {parts.layer}.{suffix}"
    try:
        state = json.loads(bytes(encoded.tolist()))
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(state, dict):
        raise ModelFormatError(f"{source} must hold a JSON object")
    return Fields(source, state)


def _sides(state: Fields) -> tuple[int, int]:
    sides = state.sides("shape")
    if sides is None:
        raise state.error("shape", "is missing")
    return sides
