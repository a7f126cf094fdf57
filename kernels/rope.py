"""Rotary position embedding of q and k, and the write of k and v into the paged cache, in one pass over the fused
projection.

Source: Su et al., "RoFormer" (2021); halves layout as GPT-NeoX, interleaved pairs as GPT-J. C++: rope.cpp; each element
is two products and one sum, each rounded, so it equals torch bit for bit and depends on its own row only.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from kernels import build, check, dispatch
from kernels.kv_codes import FORMATS, FixedScales, check_scales, quantize_rows
from tandem.errors import InternalError

MAX_HEAD_DIM = 256


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load_library("rope.cpp")
    assert lib is not None, "the cpp implementation is selected only when its libraries load"
    pointer, i64, i32, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    lib.tandem_rope_and_store.argtypes = [pointer] * 8 + [i64] * 10 + [f32] * 2 + [i32] * 3
    lib.tandem_rope_and_store.restype = i64
    return lib


def rope_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_layer: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    interleaved: bool = False,
    kv_scales: torch.Tensor | None = None,
    fixed_scales: FixedScales | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate q and k, write k and v to their slots, return q [T, Hq, D] float32 (in `out` if given).

    qkv [T, (Hq + 2 * Hkv) * D] float32: q heads, k heads, v heads. positions, slots [T] int64; slot = block *
    block_size + offset, and no slot twice. cos, sin [max_positions, rot / 2] float32: the first `rot` elements of a
    head are rotated, in pairs (i, i + rot/2), or (2i, 2i + 1) when `interleaved`. kv_layer = cache[:, layer], [blocks,
    2, Hkv, block_size, D], float32, bfloat16 (rounded to nearest even), int8 or float8_e4m3fn. `kv_scales` of the last
    two (`kernels.kv_codes`), [blocks, 2, Hkv, block_size], are written too: each row's own, or `fixed_scales`. D at
    most 256. Raises InternalError for wrong shapes or dtypes, a position outside the tables, a slot outside the cache.
    """
    tokens, dim = qkv.shape[0], kv_layer.shape[-1]
    block_stride, block_size = check.kv_layer(kv_layer, num_kv_heads, dim)
    scales_stride = check_scales(kv_layer, kv_scales)
    _check_rows(qkv, positions, slots, cos, sin, (num_heads + 2 * num_kv_heads) * dim, dim)
    if out is None:
        out = torch.empty((tokens, num_heads, dim), dtype=torch.float32)
    else:
        check.dense("out", out, (tokens, num_heads, dim))
    if dispatch.select().name != "cpp":
        cache = (kv_layer, kv_scales, fixed_scales)
        return _by_torch(qkv, positions, slots, cos, sin, cache, num_heads, interleaved, out)
    tensors = (qkv, positions, slots, cos, sin, kv_layer, kv_scales, out)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    max_positions, half = cos.shape
    shape = (tokens, num_heads, num_kv_heads, dim, half, max_positions)
    sizes = (*shape, kv_layer.shape[0], block_size, block_stride, scales_stride)
    how = (*(fixed_scales or (0.0, 0.0)), FORMATS[kv_layer.dtype], interleaved)
    bad = _library().tandem_rope_and_store(*pointers, *sizes, *how, torch.get_num_threads())
    if bad >= 0:
        raise _out_of_range(bad, positions, slots, max_positions, kv_layer)
    return out


def _check_rows(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    width: int,
    dim: int,
) -> None:
    check.rows("qkv", qkv, width)
    check.vector("positions", positions, torch.int64, qkv.shape[0])
    check.vector("slots", slots, torch.int64, qkv.shape[0])
    check.rows("cos", cos)
    max_positions, half = cos.shape
    check.dense("sin", sin, (max_positions, half))
    if dim > MAX_HEAD_DIM or 2 * half > dim:
        raise InternalError(f"head_dim {dim} must be at most {MAX_HEAD_DIM} and at least the rotated {2 * half}")


def _out_of_range(
    index: int, positions: torch.Tensor, slots: torch.Tensor, max_positions: int, kv_layer: torch.Tensor
) -> InternalError:
    return InternalError(
        f"token {index}: position {int(positions[index])} must be in [0, {max_positions}) "
        f"and slot {int(slots[index])} in [0, {kv_layer.shape[0] * kv_layer.shape[3]})"
    )


def _by_torch(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor | None, FixedScales | None],
    num_heads: int,
    interleaved: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    kv_layer, kv_scales, fixed_scales = cache
    total = kv_layer.shape[0] * kv_layer.shape[3]
    wrong = (positions < 0) | (positions >= cos.shape[0]) | (slots < 0) | (slots >= total)
    if bool(wrong.any()):
        raise _out_of_range(int(wrong.nonzero()[0]), positions, slots, cos.shape[0], kv_layer)
    step = (qkv, positions, slots, cos, sin, kv_layer, num_heads, interleaved)
    return out.copy_(rope_and_store_reference(*step, kv_scales, fixed_scales))


def rope_and_store_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_layer: torch.Tensor,
    num_heads: int,
    interleaved: bool = False,
    kv_scales: torch.Tensor | None = None,
    fixed_scales: FixedScales | None = None,
) -> torch.Tensor:
    """Do what `rope_and_store` does, by torch."""
    num_kv_heads, block_size, dim = kv_layer.shape[2:]
    qkv = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, dim)
    q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    blocks, offsets = slots // block_size, slots % block_size
    for part, rows in enumerate((rotate_reference(k, cos[positions], sin[positions], interleaved), v)):
        if kv_scales is None:
            kv_layer[blocks, part, :, offsets] = rows.to(kv_layer.dtype)
            continue
        codes, scales = quantize_rows(rows, kv_layer.dtype, None if fixed_scales is None else fixed_scales[part])
        kv_layer.view(torch.uint8)[blocks, part, :, offsets] = codes.view(torch.uint8)
        kv_scales[blocks, part, :, offsets] = scales
    return rotate_reference(q, cos[positions], sin[positions], interleaved)


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate x [T, heads, D] by cos, sin [T, rot / 2]."""
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    out = x.clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    )
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out
