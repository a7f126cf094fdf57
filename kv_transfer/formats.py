"""Element types of KV blocks as numpy holds them: codes to float32 and back. Bits are exact where the type allows it.

numpy has no bfloat16 and no 8-bit floats, so their codes are unsigned integers here. Rounding is to nearest, ties to
even, everywhere. NaN stays NaN, except in int8, which has none. Quantized rows are written as `tandem.kv_layout` says.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

STORAGE: Final[dict[str, npt.DTypeLike]] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.float16,
    "float8_e4m3": np.uint8,
    "int8": np.int8,
}
"""What numpy holds a code in."""
LARGEST: Final = {"float8_e4m3": 448.0, "int8": 127.0}
"""What the largest value of a row becomes; its scale is the quotient."""
_E4M3_SMALLEST_NORMAL = 2.0**-6
_E4M3_NAN = 0x7F


def to_float32(codes: Codes, dtype: str) -> Floats:
    """The values of `codes`, any shape; of a quantized dtype before they are scaled."""
    if dtype == "bfloat16":
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "float8_e4m3":
        return _e4m3_values()[codes]
    return codes.astype(np.float32)


def from_float32(values: Floats, dtype: str) -> Codes:
    """The codes nearest to `values`, any shape; of a quantized dtype the caller has divided by the scale."""
    if dtype == "bfloat16":
        return _to_bfloat16(values)
    if dtype == "float8_e4m3":
        return _to_e4m3(values)
    if dtype == "int8":
        return np.rint(np.nan_to_num(np.clip(values, -127.0, 127.0))).astype(np.int8)
    if dtype == "float16":
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            return values.astype(np.float16)
    return values


def quantize(values: Floats, dtype: str) -> tuple[Codes, Floats]:
    """Codes and scales of rows [..., dim]: the scales [...], NaN for a row that is not finite."""
    scales: Floats = np.abs(values).max(axis=-1) / np.float32(LARGEST[dtype])
    odd = ~np.isfinite(scales)
    # Also where the quotient is too small to divide by.
    scales[odd | (scales < np.finfo(np.float32).tiny)] = 1
    if not odd.any():
        return from_float32(values / scales[..., None], dtype), scales
    shown: Floats = np.where(odd[..., None], np.float32(0), values)
    codes = from_float32(shown / scales[..., None], dtype)
    scales[odd] = np.nan
    return codes, scales


def _to_bfloat16(values: Floats) -> Codes:
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = ((bits[nan] >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return rounded


def _to_e4m3(values: Floats) -> Codes:
    size = np.ascontiguousarray(np.minimum(np.abs(values), np.float32(448)))
    bits = size.view(np.uint32)
    odd = (bits >> np.uint32(20)) & np.uint32(1)
    normal = ((bits + np.uint32(0x7FFFF) + odd) >> np.uint32(20)) - np.uint32((127 - 7) << 3)
    small = size < np.float32(_E4M3_SMALLEST_NORMAL)
    subnormal = np.rint(np.where(small, size, np.float32(0)) * np.float32(512)).astype(np.uint32)
    codes = np.where(small, subnormal, normal)
    codes = np.where(np.isnan(values), np.uint32(_E4M3_NAN), codes)
    return np.where(np.signbit(values), codes | np.uint32(0x80), codes).astype(np.uint8)


@cache
def _e4m3_values() -> Floats:
    """The value of each of the 256 codes: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, NaN at the
    end.
    """
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values = np.where((codes & 127) == _E4M3_NAN, np.nan, values)
    return np.where(codes & 128, -values, values).astype(np.float32)
