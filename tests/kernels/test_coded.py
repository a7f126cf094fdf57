"""Products with weights kept as codes: the bits of the same weight as float32, on every path and for every code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from kernels import dispatch
from kernels.coded import (
    FP8,
    CodedWeights,
    Rounding,
    coded_linear,
    coded_linear_reference,
    coded_rows,
    pack_coded,
    round_rows,
)
from kernels.linear import linear, pack_linear
from tandem.errors import InternalError

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]
SHAPES = [(0, 64, 32), (1, 1, 1), (1, 64, 64), (7, 130, 96), (97, 65, 200)]


@pytest.fixture(params=("cpp", "torch"))
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the C++ kernel and on torch's; tiles have no part in these products."""
    with dispatch.forced(request.param):
        yield request.param


def some_weights(
    n: int, k: int, bits: int, generator: torch.Generator, scales: torch.dtype = torch.float16, order: bool = False
) -> CodedWeights:
    """Random codes in groups of 32 with random zeros; `bits` 0 is FP8."""
    groups = -(-k // 32)
    made = (torch.rand(n, groups, generator=generator) * 0.1 + 0.01).to(scales)
    if bits == 0:
        codes = torch.randn(n, k, generator=generator).to(FP8).view(torch.uint8)
        return CodedWeights(codes, made, 32, fp8=True)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (n, groups), generator=generator, dtype=torch.uint8)
    where = torch.randint(0, groups, (k,), generator=generator, dtype=torch.int32) if order else None
    return CodedWeights(codes, made, 32, bits, zeros=zeros, order=where)


def as_float32(x: torch.Tensor, weights: CodedWeights, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product that the exact path computes of the expanded weight."""
    return linear(x, pack_linear(weights.dequantized(), "exact"), bias)


@pytest.mark.parametrize("bits", [0, 2, 3, 4, 8])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_bits_are_those_of_the_expanded_weight(
    bits: int, m: int, n: int, k: int, generator: torch.Generator, same_bits: SameBits
) -> None:
    weights = some_weights(n, k, bits, generator)
    x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
    with dispatch.forced("cpp"):
        assert same_bits(coded_linear(x, pack_coded(weights), bias), as_float32(x, weights, bias))


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_every_path_matches_the_reference(
    path: str, bits: int, scales: torch.dtype, generator: torch.Generator
) -> None:
    weights = some_weights(70, 96, bits, generator, scales)
    x, bias = torch.randn(5, 96, generator=generator), torch.randn(70, generator=generator)
    packed = pack_coded(weights)
    assert (packed.panels is None) == (path == "torch")
    torch.testing.assert_close(
        coded_linear(x, packed, bias), coded_linear_reference(x, weights, bias), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("scales", [torch.float16, torch.float32])
def test_minima_are_added(path: str, scales: torch.dtype, generator: torch.Generator, same_bits: SameBits) -> None:
    base = some_weights(70, 96, 4, generator, scales)
    minima = torch.randn(70, 3, generator=generator).to(scales)
    weights, x = replace(base, zeros=None, minima=minima), torch.randn(5, 96, generator=generator)
    first = base.codes[:, :32] * base.scales[:, :1].float() + minima[:, :1].float()
    assert torch.equal(weights.dequantized()[:, :32], first)
    actual = coded_linear(x, pack_coded(weights))
    torch.testing.assert_close(actual, coded_linear_reference(x, weights), rtol=1e-4, atol=1e-4)
    if path == "cpp":
        assert same_bits(actual, as_float32(x, weights))


def test_codes_may_stand_for_a_table(path: str, generator: torch.Generator, same_bits: SameBits) -> None:
    table = torch.randn(16, generator=generator)
    weights = replace(some_weights(70, 96, 4, generator, torch.float32), zeros=None, table=table)
    x = torch.randn(5, 96, generator=generator)
    assert weights.dequantized()[3, 40] == table[int(weights.codes[3, 40])] * weights.scales[3, 1]
    actual = coded_linear(x, pack_coded(weights))
    torch.testing.assert_close(actual, coded_linear_reference(x, weights), rtol=1e-4, atol=1e-4)
    if path == "cpp":
        assert same_bits(actual, as_float32(x, weights))


@pytest.mark.parametrize("bits", [0, 2, 3, 4, 8])
def test_rows_are_those_of_the_weight(path: str, bits: int, generator: torch.Generator, same_bits: SameBits) -> None:
    weights, ids = some_weights(130, 40, bits, generator), torch.tensor([0, 129, 64, 63, 0])
    packed = pack_coded(weights)
    assert same_bits(coded_rows(packed, ids), weights.dequantized()[ids])
    assert coded_rows(packed, ids[:0]).shape == (0, 40)
    for outside in (-1, 130):
        with pytest.raises(InternalError):
            coded_rows(packed, torch.tensor([outside]))


@pytest.mark.parametrize("bits", [3, 4])
def test_inputs_may_belong_to_groups_in_any_order(
    path: str, bits: int, generator: torch.Generator, same_bits: SameBits
) -> None:
    weights, x = some_weights(65, 130, bits, generator, order=True), torch.randn(9, 130, generator=generator)
    actual = coded_linear(x, pack_coded(weights))
    torch.testing.assert_close(actual, coded_linear_reference(x, weights), rtol=1e-4, atol=1e-3)
    if path == "cpp":
        assert same_bits(actual, as_float32(x, weights))


def test_without_zeros_the_middle_is_zero(path: str) -> None:
    for bits in (2, 3, 4, 8):
        codes = torch.full((3, 32), 1 << bits >> 1, dtype=torch.uint8)
        packed = pack_coded(CodedWeights(codes, torch.ones(3, 1), 32, bits))
        assert not coded_linear(torch.ones(2, 32), packed).any()


def test_all_numbers_of_fp8_are_read(path: str, same_bits: SameBits) -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    packed = pack_coded(CodedWeights(codes, torch.ones(256, 1), 1, fp8=True))
    expected = codes.view(FP8).float().T
    actual = coded_linear(torch.ones(1, 1), packed)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert int(actual.isnan().sum()) == 2
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


def test_a_row_s_bits_are_its_own(threads: int, generator: torch.Generator, same_bits: SameBits) -> None:
    weights, x = some_weights(200, 192, 4, generator), torch.randn(130, 192, generator=generator)
    with dispatch.forced("cpp"):
        packed = pack_coded(weights)
        together = coded_linear(x, packed)
        for row in (0, 5, 96, 129):
            assert same_bits(coded_linear(x[row : row + 1], packed), together[row : row + 1])


def test_results_may_be_columns_of_a_wider_tensor(path: str, generator: torch.Generator) -> None:
    weights, x = some_weights(70, 64, 4, generator), torch.randn(3, 64, generator=generator)
    wide = torch.full((3, 100), 7.0)
    coded_linear(x, pack_coded(weights), out=wide[:, 20:90])
    torch.testing.assert_close(wide[:, 20:90], coded_linear_reference(x, weights), rtol=1e-4, atol=1e-4)
    assert bool((wide[:, :20] == 7).all())
    assert bool((wide[:, 90:] == 7).all())


@pytest.mark.parametrize(("bits", "expected"), [(2, 2), (3, 3), (4, 4), (8, 8)])
def test_memory_is_what_the_codes_take(bits: int, expected: int, generator: torch.Generator) -> None:
    weights = some_weights(128, 256, bits, generator)
    with dispatch.forced("cpp"):
        scales_and_zeros = 128 * 8 * 3
        assert pack_coded(weights).nbytes == 128 * 256 * expected // 8 + scales_and_zeros


def test_parts_that_do_not_fit_are_our_own_bug(generator: torch.Generator) -> None:
    good = some_weights(8, 64, 4, generator)
    for bad in (
        CodedWeights(good.codes, good.scales[:, :1], 32, 4),
        CodedWeights(good.codes, good.scales, 32, 5),
        CodedWeights(good.codes, good.scales, 32, 4, zeros=torch.zeros(8, 1, dtype=torch.uint8)),
        CodedWeights(good.codes, good.scales, 32, 4, minima=torch.zeros(8, 2)),
        CodedWeights(good.codes, good.scales, 32, 8, table=torch.zeros(16)),
        CodedWeights(good.codes, good.scales, 32, 4, table=torch.zeros(8)),
        CodedWeights(good.codes, good.scales, 32, 4, order=torch.full((64,), 2, dtype=torch.int32)),
    ):
        with pytest.raises(InternalError):
            pack_coded(bad)


def test_rows_are_rounded_to_8_bits_each_by_its_largest() -> None:
    x = torch.tensor([[1.0, -2.0, 0.004, 127.5], [0.0, 0.0, 0.0, 0.0]])
    assert round_rows(x, Rounding("int8")).tolist() == [[1.0, -2.0, 0.0, 127.0], [0.0, 0.0, 0.0, 0.0]]


def test_rows_are_rounded_to_fp8_by_groups_or_one_scale() -> None:
    x = torch.tensor([[448.0, 3.3, 44.8, 0.33]])
    by_group = round_rows(x, Rounding("fp8", group=2))
    assert by_group[0, 0] == 448.0
    assert by_group[0, 1] == 3.25
    torch.testing.assert_close(by_group[0, 2:], torch.tensor([44.8, 0.325]), rtol=1e-6, atol=0)
    assert round_rows(x, Rounding("fp8", scale=1.0)).tolist() == [[448.0, 3.25, 44.0, 0.34375]]
    assert round_rows(x[:0], Rounding("fp8", group=2)).shape == (0, 4)
    with pytest.raises(InternalError):
        round_rows(x, Rounding("fp8", group=3))
