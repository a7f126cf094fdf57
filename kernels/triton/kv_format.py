"""How keys and values are held in the cache, and what goes with them.

    half   the dtype of the queries (float16, bfloat16; float32 for tests).
    fp8    e4m3 codes.
    int8   codes of -127..127.

Codes go with `kv_scales` float32 [blocks, 2, Hkv, block_size], one scale for each position and head, as
`kernels.kv_codes` says; both lie in a block as `tandem.kv_layout` has them, so that block strides differ by a factor
of 4 and nothing is converted between a CPU's pool and a GPU's.

Chips without e4m3 (sm_80, gfx942 has another 8-bit format) read and write the same bytes as uint8: the helpers below
decode and encode them by integer operations, to the bits that torch's float8_e4m3fn has. Values beyond 448 are
clamped; NaN is not kept by a code, but by its position's scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.kv_codes import dequantize_rows
from kernels.triton.launch import require, target

HALF, FP8, INT8 = 0, 1, 2
LARGEST_E4M3 = 448.0


@triton.jit
def decode_e4m3(code: tl.tensor) -> tl.tensor:
    """Codes (float8_e4m3fn, or uint8 with the same bits) as float16: exact."""
    if code.dtype == tl.uint8:
        wide = code.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return bits.to(tl.float16, bitcast=True) * 256.0
    else:  # noqa: RET505  (triton wants both branches)
        return code.to(tl.float16)


@triton.jit
def encode_e4m3(x: tl.tensor) -> tl.tensor:
    """float32 as uint8 codes, rounded to nearest even, clamped to 448."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    # Below 2^-6 adding 2^14 rounds to a multiple of 2^-9, whose count is the code; above, the bits are rounded.
    small = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    large = (bits - 0x3C000000 + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    return (sign | tl.where(size < 0.015625, small, large)).to(tl.uint8)


def kv_format(kv_layer: torch.Tensor) -> int:
    """HALF, FP8 or INT8, by the dtype of the cache."""
    return {torch.int8: INT8, torch.uint8: FP8, torch.float8_e4m3fn: FP8}.get(kv_layer.dtype, HALF)


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the kernels take it: e4m3 as bytes where the chip doesn't know it."""
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn and not target().has_fp8 else tensor


def check_kv(
    kv_layer: torch.Tensor, kv_scales: torch.Tensor | None, q_dtype: torch.dtype, dim: int, like: torch.Tensor
) -> int:
    """Check `cache[:, layer]` and its scales; return the format. Raises InternalError."""
    shape, strides, form = kv_layer.shape, kv_layer.stride(), kv_format(kv_layer)
    good = len(shape) == 5 and shape[1] == 2 and shape[4] == dim and kv_layer.device == like.device
    good = good and strides[1:] == (shape[2] * shape[3] * dim, shape[3] * dim, dim, 1)
    good = good and (form != HALF or kv_layer.dtype is q_dtype)
    wanted = f"[blocks, 2, Hkv, block_size, {dim}], dense in a block, {q_dtype}, float8_e4m3fn, uint8 or int8"
    require(good, "kv_layer", kv_layer, wanted)
    require((kv_scales is None) == (form == HALF), "kv_layer", kv_layer, "with kv_scales just when it is quantised")
    if kv_scales is not None:
        good = kv_scales.shape == shape[:4] and kv_scales.stride()[1:] == (shape[2] * shape[3], shape[3], 1)
        good = good and kv_scales.dtype is torch.float32 and kv_scales.device == like.device
        require(good, "kv_scales", kv_scales, f"float32 {tuple(shape[:4])}, dense in a block")
    return form


def dequantize_reference(kv_layer: torch.Tensor, kv_scales: torch.Tensor | None) -> torch.Tensor:
    """The whole cache as float32, by torch."""
    codes = kv_layer.view(torch.float8_e4m3fn) if kv_format(kv_layer) == FP8 else kv_layer
    return dequantize_rows(codes, kv_scales, torch.float32)
