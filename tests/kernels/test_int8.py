"""Int8 products: parity with the reference on odd shapes, exact codes, and rows that know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels import dispatch
from kernels.int8 import (
    GROUP,
    GroupWeights,
    int8_linear,
    int8_linear_reference,
    int8_rows,
    pack_int8,
    quantize_weight,
    quantize_weight_reference,
    tile_weight,
    tiled_linear_reference,
)
from tandem.errors import InternalError

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]
SHAPES = [(0, 32, 64), (1, 1, 1), (1, 576, 576), (5, 33, 65), (8, 64, 32), (9, 31, 96), (17, 130, 129), (40, 70, 1536)]


def four_bits(n: int, k: int, generator: torch.Generator) -> GroupWeights:
    groups = -(-k // GROUP)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, groups, generator=generator) * 0.1
    return GroupWeights(4, codes, scales, torch.randn(n, groups, generator=generator) * 0.05).rounded()


def eight_bits(n: int, k: int, generator: torch.Generator) -> GroupWeights:
    return quantize_weight(torch.randn(n, k, generator=generator))


MAKERS = {4: four_bits, 8: eight_bits}


def close(actual: torch.Tensor, x: torch.Tensor, weights: GroupWeights, expected: torch.Tensor) -> None:
    """The bound is the sum of magnitudes times float32's unit and a small factor."""
    magnitudes = GroupWeights(weights.bits, weights.codes, weights.scales).dequantized().abs()
    if weights.minima is not None:
        magnitudes += weights.minima.abs()[:, torch.arange(x.shape[1]) // GROUP]
    bound = x.abs().double() @ magnitudes.double().T * 2e-6 + 1e-6
    assert bool(((actual.double() - expected.double()).abs() <= bound).all())


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_the_reference(
    implementation: str, m: int, n: int, k: int, bits: int, fine: bool, generator: torch.Generator
) -> None:
    weights = MAKERS[bits](n, k, generator)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-2, 2, m)[:, None]
    bias = torch.randn(n, generator=generator)
    packed = pack_int8([weights])
    assert (packed.panels is None) == (implementation == "torch")
    expected = (
        tiled_linear_reference(x, weights)
        if implementation == "tiles"
        else int8_linear_reference(x, weights, fine=fine)
    )
    close(int8_linear(x, packed, fine=fine), x, weights, expected)
    close(int8_linear(x, packed, bias, fine=fine) - bias, x, weights, (expected + bias) - bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_is_near_the_float_product(implementation: str, bits: int, generator: torch.Generator) -> None:
    weights = MAKERS[bits](96, 640, generator)
    x = torch.randn(16, 640, generator=generator)
    exact = x @ weights.dequantized().T
    packed = pack_int8([weights])
    least = (
        0.01 if implementation == "tiles" else 0.004 if bits == 4 else 1e-4
    )  # tiles take weights of one scale a column
    for fine, error in ((False, 0.01), (True, least)):
        assert float((int8_linear(x, packed, fine=fine) - exact).norm() / exact.norm()) < error


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_has_the_same_bits_in_any_batch(
    cpp: None, threads: int, bits: int, generator: torch.Generator, same_bits: SameBits
) -> None:
    packed = pack_int8([MAKERS[bits](200, 320, generator)])
    x = torch.randn(64, 320, generator=generator)
    whole = int8_linear(x, packed, fine=True)
    for m in (1, 2, 3, 7, 8, 9, 16, 33, 63):
        first = 64 - m
        assert same_bits(int8_linear(x[first:].contiguous(), packed, fine=True), whole[first:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_that_are_not_finite_stay_in_their_row(
    implementation: str, bits: int, bad: float, generator: torch.Generator
) -> None:
    packed = pack_int8([MAKERS[bits](40, 128, generator)])
    x = torch.randn(3, 128, generator=generator)
    good = int8_linear(x, packed)
    x[1, 70] = bad
    out = int8_linear(x, packed)
    assert torch.equal(out[0], good[0])
    assert torch.equal(out[2], good[2])
    assert not bool(out[1].isfinite().any())


def test_zeros_and_tiny_rows(implementation: str, generator: torch.Generator) -> None:
    packed = pack_int8([four_bits(33, 64, generator)])
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e-38), torch.full((64,), -1e-44)])
    assert torch.equal(int8_linear(x, packed), torch.zeros(3, 33))


@pytest.mark.parametrize("bits", [4, 8])
def test_fused_parts_and_order(implementation: str, bits: int, generator: torch.Generator) -> None:
    whole = MAKERS[bits](90, 96, generator)
    cut = [slice(0, 50), slice(50, 51), slice(51, 90)]
    parts = [
        GroupWeights(bits, whole.codes[c], whole.scales[c], None if whole.minima is None else whole.minima[c])
        for c in cut
    ]
    order = torch.randperm(90, generator=generator)
    x = torch.randn(5, 96, generator=generator)
    assert torch.equal(int8_linear(x, pack_int8(parts)), int8_linear(x, pack_int8([whole])))
    assert torch.equal(int8_linear(x, pack_int8(parts, order))[:, order], int8_linear(x, pack_int8([whole])))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [64, 96, 70])
def test_rows_come_back_as_they_were(implementation: str, bits: int, k: int, generator: torch.Generator) -> None:
    weights = MAKERS[bits](70, k, generator)
    packed = pack_int8([weights])
    ids = torch.tensor([0, 69, 33, 33])
    codes, scales = tile_weight(weights.dequantized())
    expected = codes * scales if implementation == "tiles" else weights.dequantized()
    assert torch.equal(int8_rows(packed, ids), expected[ids])
    with pytest.raises(InternalError, match="within"):
        int8_rows(packed, torch.tensor([70]))


@pytest.mark.parametrize("k", [1, 32, 100])
def test_quantizing_weights(k: int, generator: torch.Generator) -> None:
    weight = torch.randn(50, k, generator=generator)
    weight[3] = 0.0
    with dispatch.forced("cpp"):
        quantized = quantize_weight(weight)
    expected = quantize_weight_reference(weight)
    assert torch.equal(quantized.codes, expected.codes)
    assert torch.equal(quantized.scales, expected.scales)
    step = expected.scales[:, torch.arange(k) // GROUP]
    assert bool(((expected.dequantized() - weight).abs() <= step * 0.51 + 1e-6).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_show(implementation: str, bad: float, generator: torch.Generator) -> None:
    weight = torch.randn(40, 100, generator=generator)
    weight[7, 33:35] = torch.tensor([bad, 1.0])
    quantized = quantize_weight(weight)
    assert torch.equal(quantized.codes, quantize_weight_reference(weight).codes)
    finite = int8_linear(torch.ones(2, 100), pack_int8([quantized])).isfinite()
    assert (~finite).nonzero().tolist() == [[0, 7], [1, 7]]


def test_parts_that_do_not_fit(implementation: str, generator: torch.Generator) -> None:
    with pytest.raises(InternalError, match="same bits"):
        pack_int8([four_bits(2, 32, generator), eight_bits(2, 32, generator)])
    with pytest.raises(InternalError, match="x must be"):
        int8_linear(torch.zeros(2, 33), pack_int8([four_bits(2, 32, generator)]))
