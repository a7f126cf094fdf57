"""RMS norms: parity with torch, in-place forms, and the exact promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.norm import rms_norm, rms_norm_heads, rms_norm_heads_reference, rms_norm_reference
from tandem.errors import InternalError

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


@pytest.mark.parametrize("width", [1, 7, 16, 63, 64, 65, 576, 1537])
@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_matches_torch(implementation: str, rows: int, width: int, generator: torch.Generator) -> None:
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(width, generator=generator)
    residual = torch.randn(rows, width, generator=generator)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), rtol=1e-5, atol=1e-5)
    expected_residual = residual + x
    expected = rms_norm_reference(expected_residual, weight, 1e-5)
    before = x.clone()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, residual), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, expected_residual)
    assert torch.equal(x, before)


def test_out_may_be_x(implementation: str, generator: torch.Generator) -> None:
    x, weight = torch.randn(9, 50, generator=generator), torch.randn(50, generator=generator)
    expected = rms_norm(x, weight, 1e-6)
    assert rms_norm(x, weight, 1e-6, out=x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dim", [8, 40, 64, 128])
def test_heads_match_torch_inside_a_wider_row(implementation: str, dim: int, generator: torch.Generator) -> None:
    qkv = torch.randn(11, 8, dim, generator=generator)
    weight, original = torch.randn(dim, generator=generator), qkv.clone()
    expected = rms_norm_heads_reference(original[:, :5], weight, 1e-6)
    torch.testing.assert_close(rms_norm_heads(qkv[:, :5], weight, 1e-6), expected, rtol=1e-5, atol=1e-5)
    rms_norm_heads(qkv[:, :5], weight, 1e-6, out=qkv[:, :5])
    torch.testing.assert_close(qkv[:, :5], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(qkv[:, 5:], original[:, 5:])


@pytest.mark.parametrize("width", [576, 577, 100])
def test_a_row_has_the_same_bits_in_any_batch(
    cpp: None, threads: int, width: int, generator: torch.Generator, same_bits: SameBits
) -> None:
    x, weight = torch.randn(512, width, generator=generator), torch.randn(width, generator=generator)
    residual = torch.randn(512, width, generator=generator)
    torch.set_num_threads(1)
    alone = torch.cat([rms_norm(x[i : i + 1], weight, 1e-5, residual[i : i + 1].clone()) for i in range(512)])
    torch.set_num_threads(threads)
    for size in [*range(1, 65), 512]:
        rows = slice((size * 5) % (513 - size), (size * 5) % (513 - size) + size)
        assert same_bits(rms_norm(x[rows], weight, 1e-5, residual[rows].clone()), alone[rows]), size


def test_a_head_has_the_same_bits_as_a_row(
    cpp: None, threads: int, generator: torch.Generator, same_bits: SameBits
) -> None:
    x, weight = torch.randn(100, 12, 64, generator=generator), torch.randn(64, generator=generator)
    by_rows = rms_norm(x.view(-1, 64), weight, 1e-6).view(100, 12, 64)
    assert same_bits(rms_norm_heads(x, weight, 1e-6), by_rows)
    assert same_bits(rms_norm_heads(x[3:4], weight, 1e-6), by_rows[3:4])


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.zeros(3, 8), torch.zeros(8)
    with pytest.raises(InternalError, match="x must be"):
        rms_norm(torch.zeros(3, 8, 1), weight, 1e-5)
    with pytest.raises(InternalError, match="weight must be"):
        rms_norm(x, torch.zeros(9), 1e-5)
    with pytest.raises(InternalError, match="residual must be"):
        rms_norm(x, weight, 1e-5, torch.zeros(2, 8))
    with pytest.raises(InternalError, match="out must be"):
        rms_norm(x, weight, 1e-5, out=torch.zeros(3, 9))
    with pytest.raises(InternalError, match="x must be"):
        rms_norm_heads(torch.zeros(3, 2, 8).transpose(0, 1), weight, 1e-5)
    with pytest.raises(InternalError, match="out must be"):
        rms_norm_heads(torch.zeros(3, 2, 8), weight, 1e-5, out=torch.zeros(3, 3, 8))
