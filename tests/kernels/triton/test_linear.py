"""Quantised products in Triton's interpreter, beside torch in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton.group_linear import (
    GroupQuantized,
    group_linear,
    group_linear_reference,
    pack_pairs,
    unpack_pairs,
    written_out,
)
from kernels.triton.quantize import quantize, quantize_reference
from kernels.triton.scaled_linear import scaled_linear, scaled_linear_reference
from tandem.errors import InternalError

CODES = [torch.int8, torch.float8_e4m3fn]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("group", [None, 128])
def test_quantize(dtype: torch.dtype, group: int | None) -> None:
    x = random(3, 300) * torch.tensor([1e-3, 1.0, 0.0])[:, None]
    codes, scales = quantize(x, dtype, group=group)
    expected, expected_scales = quantize_reference(x, dtype, group)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", CODES)
def test_quantize_with_a_given_scale_clamps(dtype: torch.dtype) -> None:
    x, scale = random(3, 1500).half(), torch.tensor([0.004])
    codes, _ = quantize(x, dtype, scale=scale)
    assert torch.equal(codes.view(torch.uint8), quantize_reference(x, dtype, scale=scale)[0].view(torch.uint8))
    assert codes.float().abs().max() == {torch.int8: 127, torch.float8_e4m3fn: 448}[dtype]


def test_every_e4m3_code_is_written_as_torch_does() -> None:
    """Values between codes, ties and subnormals among them."""
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, codes * 1.001, codes * 0.999])
    x = torch.cat([x, -x]).clamp(-448, 448)[None]
    found, _ = quantize(x, torch.float8_e4m3fn, scale=torch.ones(1))
    assert torch.equal(found.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("scaling", ["tensor", "channel", "blocks"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 300), (19, 130, 256)])
def test_scaled_linear(dtype: torch.dtype, scaling: str, m: int, n: int, k: int) -> None:
    x, w, bias = random(m, k), random(n, k), random(n)
    one = torch.tensor([0.04])
    given = {"tensor": {"scale": one}, "channel": {}, "blocks": {"group": 128}}[scaling]
    x_codes, x_scales = quantize_reference(x, dtype, **given)  # type: ignore[arg-type]
    w_codes, w_scales = quantize_reference(w, dtype, **given)  # type: ignore[arg-type]
    if scaling == "blocks":
        w_scales = w_scales[::128].contiguous()
    step = (x_codes, w_codes, x_scales, w_scales, bias)
    expected = scaled_linear_reference(*step)
    torch.testing.assert_close(scaled_linear(*step, out_dtype=torch.float32), expected, rtol=1e-5, atol=1e-4)
    assert scaling == "blocks" or float((expected - (x @ w.T + bias)).abs().max()) < 4  # scales are not mixed up


def grouped(bits: int, group: int, n: int, k: int, minima: bool) -> GroupQuantized:
    generator = torch.Generator().manual_seed(9)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, k // group, generator=generator).half() / (1 << bits)
    least = torch.randn(n, k // group, generator=generator).half() if minima else None
    return GroupQuantized(bits, group, pack_pairs(codes) if bits == 4 else codes, scales, least)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("minima", [False, True])
@pytest.mark.parametrize(("group", "k"), [(32, 96), (64, 192), (128, 384), (256, 256)])
def test_group_linear(bits: int, minima: bool, group: int, k: int) -> None:
    weight, bias = grouped(bits, group, 70, k, minima), random(70)
    for m, dtype in ((1, torch.float32), (18, torch.float16)):
        x = random(m, k).to(dtype)
        tolerance = 2e-5 if dtype is torch.float32 else 1e-2
        expected = group_linear_reference(x, weight, bias)
        torch.testing.assert_close(group_linear(x, weight, bias).float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("minima", [False, True])
@pytest.mark.parametrize(("group", "k"), [(32, 96), (128, 384)])
def test_weights_written_out(bits: int, minima: bool, group: int, k: int) -> None:
    weight = grouped(bits, group, 70, k, minima)
    torch.testing.assert_close(written_out(weight, torch.float32), weight.dequantized(), rtol=1e-6, atol=1e-6)


def test_many_rows_multiply_a_weight_that_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, bias = grouped(4, 32, 70, 96, True), random(18, 96), random(70)
    few = group_linear(x, weight, bias)
    monkeypatch.setattr("kernels.triton.group_linear.MANY_ROWS", 18)
    monkeypatch.setattr("kernels.triton.group_linear.group_launches", None)
    torch.testing.assert_close(group_linear(x, weight, bias), few, rtol=2e-5, atol=2e-5)


def test_parts_of_k_are_added_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some parts have no step at all."""
    weight, x, bias = grouped(4, 32, 70, 32 * 9, True), random(3, 32 * 9), random(70)
    expected = group_linear_reference(x, weight, bias)
    for parts in (1, 2, 4):
        monkeypatch.setattr("kernels.triton.group_linear.split_count", lambda tiles, steps, parts=parts: parts)
        torch.testing.assert_close(group_linear(x, weight, bias), expected, rtol=2e-5, atol=2e-5)


def test_pairs_are_packed_and_unpacked() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(1, 64) % 16
    assert torch.equal(unpack_pairs(pack_pairs(codes)), codes)


def test_no_rows() -> None:
    assert group_linear(torch.zeros(0, 64), grouped(4, 32, 8, 64, False)).shape == (0, 8)
    none, w = torch.zeros(0, 64, dtype=torch.int8), torch.zeros(8, 64, dtype=torch.int8)
    assert scaled_linear(none, w, torch.ones(1), torch.ones(8)).shape == (0, 8)


def test_wrong_arguments_are_named() -> None:
    x, w = torch.zeros(2, 64, dtype=torch.int8), torch.zeros(8, 64, dtype=torch.int8)
    with pytest.raises(InternalError, match="w must be"):
        scaled_linear(x, w.to(torch.float8_e4m3fn), torch.ones(2), torch.ones(8))
    with pytest.raises(InternalError, match="w_scales must be"):
        scaled_linear(x, w, torch.ones(2), torch.ones(7))
    with pytest.raises(InternalError, match="groups of 48"):
        group_linear(torch.zeros(2, 96), GroupQuantized(4, 48, torch.zeros(8, 48).byte(), torch.zeros(8, 2)))
    with pytest.raises(InternalError, match="scales must be"):
        group_linear(torch.zeros(2, 64), GroupQuantized(4, 32, torch.zeros(8, 32).byte(), torch.zeros(8, 3)))
