"""GGUF tensors that `kernels.int8` can take as they are: codes, scales and minima.

Packing keeps codes and scales exactly. It rounds minima, counted from the middle of the codes' range, to bfloat16.

Block formats: https://github.com/ggml-org/ggml (ggml-common.h): Q4_0 is d * (q - 8), Q4_1 is d * q + m, Q8_0 is d * q.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from kernels.coded import CodedWeights
from kernels.int8 import GROUP, GroupWeights

_Q = GGMLQuantizationType


def group_weights(packed: Tensor, kind: GGMLQuantizationType) -> GroupWeights | None:
    """Codes of uint8 `packed` [rows, row bytes]; None when the format has to be quantised anew."""
    unpack = _UNPACK.get(kind)
    return None if unpack is None else unpack(packed)


def coded_weights(packed: Tensor, kind: GGMLQuantizationType) -> CodedWeights | None:
    """The same for `kernels.coded`, whose products have the bits of the dequantised weight; None for other formats."""
    scales = {_Q.Q4_0: 1, _Q.Q4_1: 2, _Q.Q8_0: 1}.get(kind)
    if scales is None:
        return None
    bits = 8 if kind is _Q.Q8_0 else 4
    code_bytes = GROUP * bits // 8
    blocks = packed.view(packed.shape[0], -1, 2 * scales + code_bytes)
    halves = blocks[:, :, : 2 * scales].contiguous().view(torch.float16)
    if bits == 8:
        codes = blocks[:, :, 2:].bitwise_xor(128).reshape(packed.shape[0], -1)
    else:
        codes = _nibbles(packed, 2 * scales)
    minima = halves[..., 1].contiguous() if scales == 2 else None
    return CodedWeights(codes, halves[..., 0].contiguous(), GROUP, bits, minima=minima)


def _q4_0(packed: Tensor) -> GroupWeights:
    scales, codes = _halves(packed, 1), _nibbles(packed, 2)
    return GroupWeights(4, codes, scales[0], torch.zeros_like(scales[0]))


def _q4_1(packed: Tensor) -> GroupWeights:
    scales, minima = _halves(packed, 2)
    return GroupWeights(4, _nibbles(packed, 4), scales, minima + 8 * scales)


def _q8_0(packed: Tensor) -> GroupWeights:
    blocks = packed.view(packed.shape[0], -1, 2 + GROUP)
    codes = blocks[:, :, 2:].bitwise_xor(128)  # two's complement to offset 128
    return GroupWeights(8, codes.reshape(packed.shape[0], -1), _halves(packed, 1, GROUP)[0])


def _halves(packed: Tensor, count: int, code_bytes: int = GROUP // 2) -> list[Tensor]:
    """The `count` float16 numbers that each block begins with, float32 [rows, groups] each."""
    blocks = packed.view(packed.shape[0], -1, 2 * count + code_bytes)
    return [blocks[:, :, 2 * i : 2 * i + 2].contiguous().view(torch.float16).squeeze(-1).float() for i in range(count)]


def _nibbles(packed: Tensor, start: int) -> Tensor:
    """4-bit codes uint8 [rows, K]: low nibbles are the first half of a block."""
    blocks = packed.view(packed.shape[0], -1, start + GROUP // 2)[:, :, start:]
    return torch.cat([blocks & 15, blocks >> 4], dim=-1).view(packed.shape[0], -1)


_UNPACK: Final[Mapping[GGMLQuantizationType, Callable[[Tensor], GroupWeights]]] = {
    _Q.Q4_0: _q4_0,
    _Q.Q4_1: _q4_1,
    _Q.Q8_0: _q8_0,
}
