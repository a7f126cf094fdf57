from __future__ import annotations

import numpy as np
import pytest
import torch
from pools_of_tokens import TORCH

from kernels.kv_codes import quantize_rows
from kv_transfer.formats import from_float32, quantize, to_float32

SPECIAL = [0.0, -0.0, 1.0, -1.0, 448.0, 464.0, 465.0, -500.0, 2.0**-6, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 3.4e38, 1e-45]


def floats() -> np.ndarray:
    """Numbers of every magnitude, ties included."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    ties = (rng.integers(0, 1 << 16, 4096, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000)).view(np.float32)
    ordinary = rng.standard_normal(1 << 16).astype(np.float32) * np.float32(20)
    everything = np.concatenate([bits, ties, ordinary, np.array(SPECIAL, np.float32)])
    return everything[np.isfinite(everything)]


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_sixteen_bits_are_what_torch_says(name: str, dtype: torch.dtype) -> None:
    values = floats()
    want = torch.from_numpy(values).to(dtype)
    codes = from_float32(values, name)
    assert np.array_equal(codes.view(np.int16), want.view(torch.int16).numpy())
    assert np.array_equal(to_float32(codes, name).view(np.uint32), want.float().numpy().view(np.uint32))


def test_e4m3_is_what_torch_says_within_its_range() -> None:
    values = floats()
    values = values[np.abs(values) <= 448]
    want = torch.from_numpy(values).to(torch.float8_e4m3fn)
    codes = from_float32(values, "float8_e4m3")
    assert np.array_equal(codes, want.view(torch.uint8).numpy())
    assert np.array_equal(to_float32(codes, "float8_e4m3"), want.float().numpy())
    every = np.arange(256, dtype=np.uint8)
    decoded = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(to_float32(every, "float8_e4m3"), decoded, equal_nan=True)


def test_what_is_too_large_for_eight_bits_becomes_the_largest() -> None:
    values = np.array([449, 1e9, -np.inf, np.inf], np.float32)
    assert to_float32(from_float32(values, "float8_e4m3"), "float8_e4m3").tolist() == [448, 448, -448, 448]
    assert from_float32(values, "int8").tolist() == [127, 127, -127, 127]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float8_e4m3"])
def test_nan_stays_nan(name: str) -> None:
    payloads = np.array([0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(to_float32(from_float32(payloads, name), name)).all()


@pytest.mark.parametrize(("name", "largest"), [("int8", 127.0), ("float8_e4m3", 448.0)])
def test_a_rows_scale_makes_its_largest_value_the_largest_code(name: str, largest: float) -> None:
    rows = np.array([[-6, 3], [1e-44, 0], [np.inf, 1], [np.nan, -2], [0, 0]], np.float32)
    codes, scales = quantize(rows, name)
    assert np.array_equal(scales, np.array([6 / largest, 1, np.nan, np.nan, 1], np.float32), equal_nan=True)
    assert to_float32(codes[0], name)[0] == -largest
    assert not codes[1:].any()


@pytest.mark.parametrize("name", ["int8", "float8_e4m3"])
def test_rows_are_quantized_as_the_reference_of_the_kernels_says(name: str) -> None:
    values = floats()[: 1 << 16].reshape(-1, 8) * np.float32(0.5)
    codes, scales = quantize(values, name)
    want, want_scales = quantize_rows(torch.from_numpy(values), TORCH[name])
    assert np.array_equal(codes.view(np.uint8), want.view(torch.uint8).numpy())
    assert np.array_equal(scales, want_scales.numpy())
