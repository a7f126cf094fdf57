"""Quantized keys and values: rows of the cache as 8-bit codes with a scale for each position and head.

The rule is `tandem.kv_layout.QUANTIZED`'s, in torch here: what every kernel that writes or reads such a cache is held
against. A scale for each position is what lets a cache grow token by token: nothing that was written is ever rounded
again, so a row's bits don't depend on what came later or beside it, nor on how blocks are cut.
"""

from __future__ import annotations

from typing import Final

import torch

from tandem.errors import InternalError

LARGEST: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What a row's largest magnitude becomes."""
FORMATS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}
"""What the C++ kernels call a cache's format (kv_codes.h)."""

FixedScales = tuple[float, float]
"""Of all keys and all values of a layer, as a checkpoint has them; in place of each row's own."""


def is_quantized(dtype: torch.dtype) -> bool:
    """True for caches that have scales."""
    return dtype in LARGEST


def quantize_rows(
    values: torch.Tensor, dtype: torch.dtype, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., D] of `dtype` and scales float32 [...] of rows [..., D] float32.

    `scale` is used for every row when given (a checkpoint's); NaN for a row that is not finite.
    """
    largest = LARGEST[dtype]
    scales = values.abs().amax(-1) / largest
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)
    finite = scales.isfinite()
    if scale is not None:
        scales = torch.full_like(scales, scale)
    shown = values.where(finite[..., None], 0.0) / scales.where(finite, 1.0)[..., None]
    shown = shown.clamp(-largest, largest)
    codes = shown.round().to(dtype) if dtype is torch.int8 else shown.to(dtype)
    return codes, scales.where(finite, torch.nan)


def dequantize_rows(codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Values [..., D] of `dtype`, which codes [..., D] with scales [...] (None: not quantized) stand for."""
    return codes.to(dtype) if scales is None else codes.to(dtype) * scales[..., None].to(dtype)


def check_scales(kv_layer: torch.Tensor, kv_scales: torch.Tensor | None) -> int:
    """Require scales float32 [blocks, 2, Hkv, block_size], dense in a block, just where `kv_layer` [blocks, 2, Hkv,
    block_size, D] is quantized; return the stride between blocks (0 without). Raises InternalError.
    """
    if not is_quantized(kv_layer.dtype):
        if kv_scales is not None:
            raise InternalError(f"a cache of {kv_layer.dtype} has no scales")
        return 0
    blocks, _, heads, size = kv_layer.shape[:4]
    wanted = (blocks, 2, heads, size)
    if (
        kv_scales is None
        or kv_scales.shape != wanted
        or kv_scales.dtype is not torch.float32
        or kv_scales.stride()[1:] != (heads * size, size, 1)
        or not kv_scales.is_cpu
    ):
        got = "none" if kv_scales is None else f"{kv_scales.dtype} {tuple(kv_scales.shape)}, {kv_scales.stride()}"
        raise InternalError(
            f"kv_scales of a cache of {kv_layer.dtype} must be float32 {wanted}, dense in a block; got {got}"
        )
    return kv_scales.stride(0)
