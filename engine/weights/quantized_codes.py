"""Codes out of the 32-bit words that quantising tools pack them into: little-endian streams of bits along a row."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

WORD: Final = 32
AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight columns lies in AWQ's word."""


def packed_words(count: int, bits: int) -> int:
    """Words that `count` codes take."""
    return -(-count * bits // WORD)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, count], new memory: the first `count` codes of `bits` (2, 3, 4, 8) of each row."""
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data[:, :count].clone() if words.is_contiguous() else data[:, :count].contiguous()
    if bits == 3:
        return _unpack3(data)[:, :count].contiguous()
    fields = torch.empty(*data.shape, 8 // bits, dtype=torch.uint8)  # the only memory, however large the layer
    for place, shift in enumerate(range(0, 8, bits)):
        torch.bitwise_right_shift(data, shift, out=fields[..., place])
    fields.bitwise_and_((1 << bits) - 1)
    return fields.view(data.shape[0], -1)[:, :count].contiguous()


def _unpack3(data: Tensor) -> Tensor:
    """Eight codes in three bytes."""
    rows, size = data.shape
    padded = torch.zeros(rows, -(-size // 3) * 3, dtype=torch.uint8)
    padded[:, :size] = data
    low, middle, high = padded.view(rows, -1, 3).unbind(-1)
    # Of bytes alone, whose bits beyond 8 are lost: wider words would take several times the weight.
    fields = (low, low >> 3, low >> 6 | middle << 2, middle >> 1)
    more = (middle >> 4, middle >> 7 | high << 1, high >> 2, high >> 5)
    return torch.stack([*fields, *more], dim=-1).bitwise_and_(7).view(rows, -1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] -> int32 [R, words]: what `unpack` undoes."""
    rows, count = codes.shape
    words = packed_words(count, bits)
    stream = torch.zeros(rows, words * WORD // bits if bits != 3 else -(-words * WORD // 24) * 8, dtype=torch.int32)
    stream[:, :count] = codes
    if bits == 3:
        whole = (stream.view(rows, -1, 8) << torch.arange(0, 24, 3)).sum(-1, dtype=torch.int32)
        data = torch.stack([whole >> shift & 255 for shift in (0, 8, 16)], dim=-1).to(torch.uint8).view(rows, -1)
        return data[:, : words * 4].contiguous().view(torch.int32)
    per_byte = 8 // bits
    fields = stream.view(rows, -1, per_byte) << torch.arange(0, 8, bits)
    return fields.sum(-1).to(torch.uint8).contiguous().view(torch.int32)


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [R, W] in AWQ's order of columns -> uint8 [R, 8 W], new memory."""
    codes = unpack(words, 4, words.shape[1] * 8).view(words.shape[0], -1, 8)
    return codes[:, :, list(AWQ_PLACES)].reshape(words.shape[0], -1)


def raise_zeros(words: Tensor, bits: int, count: int) -> Tensor:
    """GPTQ's first convention: zeros int32 [G, W] that are stored one less, as uint8 [G, count].

    The tool adds one to the fields of a whole word, so that a field that overflowed when one was taken off comes back.
    """
    if bits == 3:
        return unpack(words, bits, count).add_(1).bitwise_and_(7)
    ones = sum(1 << shift for shift in range(0, WORD, bits))
    return unpack(words + torch.tensor(ones, dtype=torch.int64).to(torch.int32), bits, count)
