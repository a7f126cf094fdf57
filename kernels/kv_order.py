"""The order of keys and values within a block of the cache.

    plain   keys and values [block_size, D]: a position's elements side by side.
    paired  keys [D / 2, block_size, 2], values [block_size / 2, D, 2], bfloat16 or 8-bit codes: what one instruction
    multiplies lies side by side (pairs of dims for scores, pairs of positions for sums), so attention reads bfloat16
    in place and widens codes without moving them.

Both take the same bytes, and results have the same bits with either. A block's tensor has the shape of the plain order
whatever its order is.
"""

from __future__ import annotations

import functools

import torch

from kernels import build
from kernels.kv_codes import is_quantized
from tandem.errors import InternalError

PLAIN = "plain"
PAIRED = "paired"
POSITIONS = 16
"""A paired block's size is a multiple of this."""


@functools.cache
def multiplies_pairs(head_dim: int) -> bool:
    """True where the C++ kernels are there and multiply pairs of bfloat16 for heads of this width."""
    lib = build.load_library("attention.cpp")
    return lib is not None and bool(lib.tandem_bf16_attention_fits(head_dim))


def best_order(dtype: torch.dtype, block_size: int, head_dim: int) -> str:
    """The order that attention with `rounded` is fastest with, on this machine."""
    narrow = dtype is torch.bfloat16 or is_quantized(dtype)
    fits = narrow and block_size % POSITIONS == 0 and multiplies_pairs(head_dim)
    return PAIRED if fits else PLAIN


def check_order(order: str, dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    """Raise InternalError for an order that is unknown, or paired where `best_order` says plain."""
    if order != PLAIN and order != best_order(dtype, block_size, head_dim):
        raise InternalError(
            f"KV order {order!r} can't be had here: {dtype}, blocks of {block_size}, heads of {head_dim}; allowed are "
            f"{PLAIN}, and {PAIRED} with 16 or 8 bits, blocks of a multiple of {POSITIONS}, a CPU that multiplies pairs"
        )


def to_paired(plain: torch.Tensor) -> torch.Tensor:
    """A copy of blocks [..., 2, Hkv, block_size, D] in plain order, in paired order."""
    keys, values = plain.unbind(-4)
    *outer, slots, dim = keys.shape
    paired_keys = keys.reshape(*outer, slots, dim // 2, 2).transpose(-3, -2)
    paired_values = values.reshape(*outer, slots // 2, 2, dim).transpose(-2, -1)
    return torch.stack([paired_keys.reshape(keys.shape), paired_values.reshape(keys.shape)], -4)


def to_plain(paired: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_paired`."""
    keys, values = paired.unbind(-4)
    *outer, slots, dim = keys.shape
    plain_keys = keys.reshape(*outer, dim // 2, slots, 2).transpose(-3, -2)
    plain_values = values.reshape(*outer, slots // 2, dim, 2).transpose(-2, -1)
    return torch.stack([plain_keys.reshape(keys.shape), plain_values.reshape(keys.shape)], -4)
