"""Input checks shared by the operations: cheap (well under a microsecond each), clear when they fail.

All raise InternalError: shapes and dtypes are set by our own engine, never by a client.
"""

from __future__ import annotations

import torch

from tandem.errors import InternalError

FLOATS = (torch.float32, torch.bfloat16)
KV_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def fail(name: str, tensor: torch.Tensor, expected: str) -> InternalError:
    """Build the error for argument `name`: what was expected and what came."""
    return InternalError(
        f"{name} must be {expected}; got {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, "
        f"on {tensor.device}"
    )


def rows(name: str, tensor: torch.Tensor, width: int | None = None) -> None:
    """Require a contiguous float32 CPU tensor [rows, width] (any width when None)."""
    shape = tensor.shape
    if (
        len(shape) != 2
        or tensor.dtype is not torch.float32
        or (width is not None and shape[1] != width)
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise fail(name, tensor, f"contiguous float32 [rows, {width if width is not None else 'width'}] on the CPU")


def dense(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """Require a contiguous CPU tensor of exactly this shape and dtype."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        raise fail(name, tensor, f"contiguous {dtype} {shape} on the CPU")


def vector(name: str, tensor: torch.Tensor, dtype: torch.dtype, length: int | None = None) -> None:
    """Require a contiguous CPU vector of this dtype (any length when None)."""
    if (
        tensor.dim() != 1
        or tensor.dtype is not dtype
        or (length is not None and tensor.shape[0] != length)
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise fail(name, tensor, f"contiguous {dtype} [{'any' if length is None else length}] on the CPU")


def kv_layer(tensor: torch.Tensor, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Require `cache[:, layer]`: [blocks, 2, num_kv_heads, block_size, head_dim], dense within each block.

    Returns (stride between blocks in elements, block_size).
    """
    shape, strides = tensor.shape, tensor.stride()
    if (
        len(shape) != 5
        or shape[1] != 2
        or shape[2] != num_kv_heads
        or shape[4] != head_dim
        or tensor.dtype not in KV_DTYPES
        or strides[1:] != (num_kv_heads * shape[3] * head_dim, shape[3] * head_dim, head_dim, 1)
        or not tensor.is_cpu
    ):
        raise fail(
            "kv_layer",
            tensor,
            f"[blocks, 2, {num_kv_heads}, block_size, {head_dim}], one of {KV_DTYPES}, dense in a block",
        )
    return strides[0], shape[3]
