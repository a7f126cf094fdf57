"""Norms, activations, embedding, rotation and the write of keys and values, in Triton's interpreter beside torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton.activation import KINDS, gated, gated_reference
from kernels.triton.embedding import embedding, embedding_reference
from kernels.triton.norm import norm_reference, rms_norm, rms_norm_heads
from kernels.triton.rope import rope_and_store, rope_and_store_reference
from tandem.errors import InternalError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES[:2])  # the interpreter truncates to bfloat16, and sums show it
@pytest.mark.parametrize("width", [1, 100, 1024])
def test_norm(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(1)
    x, residual, weight = torch.randn(3, width).to(dtype), torch.randn(3, width).to(dtype), torch.randn(width)
    close(rms_norm(x, weight, 1e-5), norm_reference(x, weight, 1e-5))
    expected_residual = residual.clone()
    expected = norm_reference(x, weight, 1e-5, expected_residual)
    close(
        rms_norm(x, weight.to(dtype), 1e-5, residual, out=x), norm_reference(expected_residual, weight.to(dtype), 1e-5)
    )
    close(x, expected)
    assert torch.equal(residual, expected_residual)


def test_norm_of_heads_in_wider_rows() -> None:
    torch.manual_seed(1)
    qkv, weight = torch.randn(3, 6, 32).half(), torch.randn(32)
    before, expected = qkv.clone(), norm_reference(qkv[:, :4], weight, 1e-6)
    close(rms_norm_heads(qkv[:, :4], weight, 1e-6, out=qkv[:, :4]), expected)
    assert torch.equal(qkv[:, 4:], before[:, 4:])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # an infinity is what is wanted
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    gate_up = torch.randn(3, 2 * 1100).to(dtype) * 4
    close(gated(gate_up, kind), gated_reference(gate_up, kind))
    wide = torch.tensor([[-60000.0, -100.0, 0.0, 100.0, 60000.0, *[1.0] * 5]]).to(dtype)
    close(gated(wide, kind), gated_reference(wide, kind))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: torch.dtype) -> None:
    table, ids = torch.randn(50, 1100).to(dtype), torch.tensor([0, 49, 7, 7, 50, -1])
    assert torch.equal(embedding(ids, table), embedding_reference(ids, table))
    assert torch.equal(embedding(ids[:4].int(), table, first=5), embedding_reference(ids[:4], table, first=5))
    assert not embedding(ids, table)[4:].any()


def rope_inputs(form: str, dim: int, half: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    cos, sin = torch.rand(40, half), torch.rand(40, half)
    positions, slots = torch.tensor([3, 0, 39, 7, 8]), torch.tensor([17, 0, -1, 31, 5])
    kv = torch.zeros(4, 2, 2, 3, 8, dim, dtype={"fp8": torch.uint8, "int8": torch.int8}.get(form, dtype))
    return torch.randn(5, (6 + 2 * 3) * dim).to(dtype), positions, slots, cos, sin, kv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "half"), [(16, 8), (80, 16), (24, 12)])
def test_rope_and_store(dtype: torch.dtype, interleaved: bool, dim: int, half: int) -> None:
    *rows, kv = rope_inputs("half", dim, half, dtype)
    expected_kv = kv.clone()
    q = rope_and_store(*rows, kv[:, 1], 6, interleaved=interleaved)  # type: ignore[misc, arg-type]
    close(q, rope_and_store_reference(*rows, expected_kv[:, 1], 6, interleaved))  # type: ignore[misc, arg-type]
    close(kv, expected_kv)
    assert not kv[:, 0].any()


@pytest.mark.parametrize("fixed", [None, (0.02, 0.001)])
@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize(("dim", "half"), [(16, 8), (80, 16)])
def test_rope_and_store_quantised(form: str, dim: int, half: int, fixed: tuple[float, float] | None) -> None:
    """The same codes and scales to the bit, also of rows that are zero, huge or no numbers."""
    qkv, *rows, kv = rope_inputs(form, dim, half, torch.float32)
    qkv[0] *= 1e-41
    qkv[1] *= 1e30
    qkv[3, -1] = qkv[4, -dim - 1] = torch.nan
    scales = torch.zeros(4, 2, 2, 3, 8)
    expected_kv, expected_scales = kv.clone(), scales.clone()
    given, expected = (kv[:, 1], 6), (expected_kv[:, 1], 6, False, expected_scales[:, 1], fixed)
    q = rope_and_store(qkv, *rows, *given, kv_scales=scales[:, 1], fixed_scales=fixed)  # type: ignore[misc, arg-type]
    close(q, rope_and_store_reference(qkv, *rows, *expected))  # type: ignore[misc, arg-type]
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(kv, expected_kv)
    assert kv[:, 1].any()
    assert scales.isnan().sum() == 2


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InternalError, match="residual must be"):
        rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-5, torch.zeros(2, 5))
    with pytest.raises(InternalError, match="gate_up must be"):
        gated(torch.zeros(2, 3), "silu")
    with pytest.raises(InternalError, match="activation 'relu' is unknown"):
        gated(torch.zeros(2, 4), "relu")
    with pytest.raises(InternalError, match="ids must be"):
        embedding(torch.zeros(3), torch.zeros(4, 4))
