"""Linear layers: parity with torch on odd shapes, and the exact promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels import dispatch
from kernels.linear import linear, linear_reference, pack_linear
from tandem.errors import ConfigError, InternalError

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]
FLOATS = [torch.float32, torch.bfloat16]
SHAPES = [
    *[(0, 64, 16), (1, 1, 1), (1, 576, 576), (5, 65, 577), (6, 63, 7), (12, 64, 128)],
    *[(13, 130, 129), (96, 33, 64), (97, 200, 300), (200, 129, 257)],
]


def close(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Compare with float64; the bound is the sum of magnitudes times float32's unit and a small factor."""
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    bound = (x.abs().double() @ weight.abs().double().T + 1.0) * 3e-6
    assert bool(((actual.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_torch(
    implementation: str, dtype: torch.dtype, m: int, n: int, k: int, generator: torch.Generator
) -> None:
    x = torch.randn(m, k, generator=generator)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator)
    packed = pack_linear(weight, "exact")
    assert packed.panels == (implementation != "torch")
    close(linear(x, packed), x, weight)
    close(linear(x, packed, bias), x, weight, bias)
    torch.testing.assert_close(linear(x, packed, bias), linear_reference(x, weight, bias), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_fused_parts_equal_one_weight(implementation: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = torch.randn(300, 70, generator=generator).to(dtype)
    x = torch.randn(9, 70, generator=generator)
    parts = list(weight.split([100, 1, 37, 162]))
    assert torch.equal(linear(x, pack_linear(parts, "exact")), linear(x, pack_linear(weight, "exact")))


def test_a_transposed_weight_is_packed_by_value(cpp: None, generator: torch.Generator) -> None:
    weight = torch.randn(40, 90, generator=generator).T
    x = torch.randn(3, 40, generator=generator)
    assert torch.equal(linear(x, pack_linear(weight, "exact")), linear(x, pack_linear(weight.contiguous(), "exact")))


def test_nbytes_counts_one_copy(cpp: None) -> None:
    assert pack_linear(torch.zeros(128, 10), "exact").nbytes == 128 * 10 * 4
    assert pack_linear(torch.zeros(100, 10, dtype=torch.bfloat16), "exact").nbytes == 128 * 10 * 2
    assert pack_linear(torch.zeros(100, 10), "bf16").nbytes == 100 * 10 * 2


def test_weights_packed_for_one_path_survive_the_other(generator: torch.Generator) -> None:
    weight, x = torch.randn(65, 30, generator=generator), torch.randn(4, 30, generator=generator)
    with dispatch.forced("cpp"):
        packed = pack_linear(weight, "exact")
    with dispatch.forced("torch"):
        close(linear(x, packed), x, weight)


@pytest.mark.parametrize("m", [1, 3, 40])
def test_bf16_compute_is_near(implementation: str, m: int, generator: torch.Generator) -> None:
    weight, x = torch.randn(130, 256, generator=generator), torch.randn(m, 256, generator=generator)
    bias, out = torch.randn(130, generator=generator), torch.empty(m, 130)
    actual = linear(x, pack_linear(weight, "bf16"), bias, out)
    assert actual is out
    assert actual.dtype is torch.float32
    torch.testing.assert_close(actual, linear_reference(x, weight, bias), rtol=0.05, atol=0.5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "k"), [(200, 300), (64, 577), (1000, 129)])
def test_a_row_has_the_same_bits_in_any_batch(
    cpp: None, threads: int, dtype: torch.dtype, n: int, k: int, generator: torch.Generator, same_bits: SameBits
) -> None:
    x = torch.randn(512, k, generator=generator)
    bias = torch.randn(n, generator=generator)
    packed = pack_linear(torch.randn(n, k, generator=generator).to(dtype), "exact")
    torch.set_num_threads(1)
    alone = torch.cat([linear(x[i : i + 1], packed, bias) for i in range(512)])
    torch.set_num_threads(threads)
    for size in [*range(1, 67), 95, 96, 97, 192, 193, 511, 512]:
        start = (size * 7) % (513 - size)
        assert same_bits(linear(x[start : start + size], packed, bias), alone[start : start + size]), size
    for chunk in (7, 100, 300):
        assert same_bits(torch.cat([linear(part, packed, bias) for part in x.split(chunk)]), alone), chunk


def test_threads_and_alignment_change_no_bit(cpp: None, generator: torch.Generator, same_bits: SameBits) -> None:
    packed = pack_linear(torch.randn(576, 576, generator=generator), "exact")
    for m in (1, 5, 40):
        x = torch.randn(m, 576, generator=generator)
        shifted_x, shifted_out = torch.empty(m * 576 + 3), torch.empty(m * 576 + 1)
        view = shifted_x[3:].view(m, 576).copy_(x)
        expected, before = linear(x, packed), torch.get_num_threads()
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert same_bits(linear(view, packed, out=shifted_out[1:].view(m, 576)), expected)
        torch.set_num_threads(before)


def test_a_neighbour_that_is_not_finite_stays_alone(cpp: None, generator: torch.Generator, same_bits: SameBits) -> None:
    packed = pack_linear(torch.randn(70, 33, generator=generator), "exact")
    x = torch.randn(20, 33, generator=generator)
    expected = linear(x, packed)
    x[7] = torch.nan
    x[8, 3] = torch.inf
    actual = linear(x, packed)
    assert same_bits(actual[9:], expected[9:])
    assert same_bits(actual[:7], expected[:7])
    assert bool(actual[7].isnan().all())


def test_wrong_arguments_are_named() -> None:
    packed = pack_linear(torch.zeros(4, 8), "exact")
    with pytest.raises(ConfigError, match="int8"):
        pack_linear(torch.zeros(4, 8), "int8")
    for parts in ([], [torch.zeros(4)], [torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(2, 2).half()]):
        with pytest.raises(InternalError):
            pack_linear(parts, "exact")
    with pytest.raises(InternalError):
        pack_linear([torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16)], "exact")
    with pytest.raises(InternalError, match="x must be"):
        linear(torch.zeros(2, 9), packed)
    with pytest.raises(InternalError, match="x must be"):
        linear(torch.zeros(8, 2).T, packed)
    with pytest.raises(InternalError, match="x must be"):
        linear(torch.zeros(2, 8, dtype=torch.float64), packed)
    with pytest.raises(InternalError, match="bias must be"):
        linear(torch.zeros(2, 8), packed, torch.zeros(5))
    with pytest.raises(InternalError, match="out must be"):
        linear(torch.zeros(2, 8), packed, out=torch.zeros(2, 5))
