"""silu(gate) * up: parity over the whole range of float32, and the exact promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.activation import silu_mul, silu_mul_reference
from tandem.errors import InternalError

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


@pytest.mark.parametrize("rows", [0, 1, 3, 200])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 100, 1536])
@pytest.mark.parametrize("spread", [1.0, 50.0])
def test_matches_torch(implementation: str, rows: int, width: int, spread: float, generator: torch.Generator) -> None:
    gate_up = torch.randn(rows, 2 * width, generator=generator) * spread
    torch.testing.assert_close(silu_mul(gate_up), silu_mul_reference(gate_up), rtol=2e-6, atol=1e-30)


def test_special_values(implementation: str) -> None:
    gates = torch.tensor([[0.0, -0.0, 90.0, -90.0, 1e30, -1e30, -torch.inf, torch.inf, torch.nan, 88.8, -88.8]])
    actual = silu_mul(torch.cat([gates, torch.ones_like(gates)], dim=1))[0]
    for index, expected in enumerate([0.0, 0.0, 90.0, 0.0, 1e30, 0.0]):
        assert abs(actual[index].item() - expected) <= 1e-6 * abs(expected) + 1e-30
    assert bool(actual[6].isnan())  # -inf / (1 + inf), as torch
    assert actual[7].item() == torch.inf
    assert bool(actual[8].isnan())
    assert actual[9].item() == pytest.approx(88.8)


@pytest.mark.parametrize("width", [1536, 101])
def test_a_row_has_the_same_bits_in_any_batch(
    cpp: None, threads: int, width: int, generator: torch.Generator, same_bits: SameBits
) -> None:
    gate_up = torch.randn(512, 2 * width, generator=generator) * 5
    whole = silu_mul(gate_up)
    for size in range(1, 65):
        start = size * 11 % (513 - size)
        assert same_bits(silu_mul(gate_up[start : start + size]), whole[start : start + size]), size


def test_an_element_has_the_same_bits_at_any_place(cpp: None, generator: torch.Generator, same_bits: SameBits) -> None:
    """Vector bodies and padded tails must agree: the same numbers, rotated through a row of odd width."""
    gate, up = torch.randn(1, 37, generator=generator) * 5, torch.randn(1, 37, generator=generator)
    expected = silu_mul(torch.cat([gate, up], dim=1))
    for shift in range(37):
        rolled = silu_mul(torch.cat([gate.roll(shift, 1), up.roll(shift, 1)], dim=1))
        assert same_bits(rolled.roll(-shift, 1), expected)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InternalError, match="gate_up must be"):
        silu_mul(torch.zeros(2, 3))
    with pytest.raises(InternalError, match="gate_up must be"):
        silu_mul(torch.zeros(2, 4, dtype=torch.bfloat16))
    with pytest.raises(InternalError, match="out must be"):
        silu_mul(torch.zeros(2, 4), torch.zeros(2, 4))
