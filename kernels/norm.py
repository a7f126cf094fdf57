"""RMS normalisation of rows, with an optional residual sum, and of heads (q/k norm).

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). C++: norm.cpp; a row's bits depend on that
row only.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from kernels import build, check, dispatch


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load_library("norm.cpp")
    assert lib is not None, "the cpp implementation is selected only when its libraries load"
    pointer, i64, i32, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    lib.tandem_rms_norm.argtypes = [pointer, pointer, pointer, pointer, i64, i64, f32, i32]
    lib.tandem_rms_norm.restype = None
    lib.tandem_rms_norm_heads.argtypes = [pointer, pointer, pointer, i64, i64, i64, i64, i64, f32, i32]
    lib.tandem_rms_norm_heads.restype = None
    return lib


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight for each row.

    x [rows, width] float32, weight [width] float32. With `residual` [rows, width] float32: residual += x in place, and
    the sum is what gets normalised. The result goes to `out` if given (`out` may be `x`). Raises InternalError for
    wrong shapes or dtypes.
    """
    check.rows("x", x)
    rows, width = x.shape
    check.dense("weight", weight, (width,))
    if residual is not None:
        check.dense("residual", residual, (rows, width))
    if out is None:
        out = torch.empty_like(x)
    else:
        check.dense("out", out, (rows, width))
    if dispatch.select().name != "cpp":
        return out.copy_(rms_norm_reference(x, weight, eps, residual))
    residual_data = None if residual is None else residual.data_ptr()
    _library().tandem_rms_norm(
        x.data_ptr(), residual_data, weight.data_ptr(), out.data_ptr(), rows, width, eps, torch.get_num_threads()
    )
    return out


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Do what `rms_norm` does, by torch; works on any leading shape."""
    if residual is not None:
        x = residual.add_(x)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rms_norm_heads(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Normalise each head of each row: x [rows, heads, dim] float32, weight [dim] float32, result like x.

    x and `out` may be slices of wider rows, as `qkv.view(T, Hq + 2 * Hkv, D)[:, :Hq]`: only a row's heads must be
    dense. `out` may be `x` itself. Raises InternalError for wrong shapes or dtypes.
    """
    _check_heads("x", x)
    rows, heads, dim = x.shape
    check.dense("weight", weight, (dim,))
    if out is None:
        out = torch.empty((rows, heads, dim), dtype=torch.float32)
    else:
        _check_heads("out", out)
        if out.shape != x.shape:
            raise check.fail("out", out, f"of x's shape {tuple(x.shape)}")
    if dispatch.select().name != "cpp":
        return out.copy_(rms_norm_heads_reference(x, weight, eps))
    pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    sizes = (rows, heads, dim, x.stride(0), out.stride(0))
    _library().tandem_rms_norm_heads(*pointers, *sizes, eps, torch.get_num_threads())
    return out


def _check_heads(name: str, tensor: torch.Tensor) -> None:
    if (
        tensor.dim() != 3
        or tensor.dtype is not torch.float32
        or tensor.stride(2) != 1
        or tensor.stride(1) != tensor.shape[2]
        or not tensor.is_cpu
    ):
        raise check.fail(name, tensor, "float32 [rows, heads, dim] on the CPU, each row's heads dense")


def rms_norm_heads_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Do what `rms_norm_heads` does, by torch."""
    return rms_norm_reference(x, weight, eps)
