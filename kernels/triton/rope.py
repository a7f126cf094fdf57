"""Rotary position embedding of q and k and the write of k and v into the paged cache, in one pass, on a GPU.

Source: Su et al., "RoFormer" (2021); halves layout as GPT-NeoX, interleaved pairs as GPT-J. Computes in float32. A
program takes one token and a few heads. Quantised caches (`kernels.triton.kv_format`) are written in the same pass;
each position and head gets its own scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.kv_codes import quantize_rows
from kernels.rope import rotate_reference
from kernels.triton.kv_format import FP8, HALF, check_kv, encode_e4m3, kv_format
from kernels.triton.launch import FLOATS, Launch, require, require_dense

HEADS = 4
"""Heads of a program."""


@triton.jit
def _write(
    values: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    kv_ptr: tl.tensor,
    scale: tl.tensor,
    FORMAT: tl.constexpr,
) -> None:
    """Store values [HEADS, N] float32 to the cache; scale [HEADS, 1] that is not NaN only where they are finite."""
    if FORMAT == 0:
        tl.store(kv_ptr + at, values.to(kv_ptr.dtype.element_ty), mask=mask)
    else:
        scale = tl.broadcast_to(scale, values.shape)
        known = scale == scale
        codes = tl.div_rn(tl.where(known, values, 0.0), tl.where(known, scale, 1.0))
        if FORMAT == 1:
            tl.store(kv_ptr + at, encode_e4m3(codes), mask=mask)
        else:
            codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
            codes = (codes + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is left is rounded to nearest even
            tl.store(kv_ptr + at, codes.to(tl.int8), mask=mask)


@triton.jit
def _largest(values: tl.tensor) -> tl.tensor:
    """The bits [HEADS] of the largest magnitude of values [HEADS, N]: a NaN's are larger than any number's."""
    return tl.max(tl.abs(values).to(tl.int32, bitcast=True), 1)


@triton.jit
def _scale_of(
    bits: tl.tensor, fixed: tl.tensor, smallest: tl.tensor, FIXED: tl.constexpr, FORMAT: tl.constexpr
) -> tl.tensor:
    """Scales [HEADS] of rows by the bits of their largest magnitudes; `kernels.kv_codes` has the rule."""
    largest = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, 448.0 if FORMAT == 1 else 127.0, tl.float32))
    scale = tl.where(scale < smallest, 1.0, scale)
    return tl.where(largest < float("inf"), fixed if FIXED else scale, float("nan"))


@triton.jit
def _rope_and_store(
    qkv_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    kv_stride: tl.tensor,
    scales_stride: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    smallest: tl.tensor,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF_ROT: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr,
    FIXED: tl.constexpr,
) -> None:
    """Heads are counted through q, k and v. What is not rotated (v, dims beyond rot) is multiplied by 1."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair, rest = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :] + 2 * HALF_ROT
    known, rotated = head < Q_HEADS + 2 * KV_HEADS, head < Q_HEADS + KV_HEADS
    in_pair, in_rest = known & (pair < HALF_ROT), known & (rest < D)
    one = pair * 2 if INTERLEAVED else pair
    two = one + 1 if INTERLEAVED else one + HALF_ROT
    row = qkv_ptr + (token * (Q_HEADS + 2 * KV_HEADS) + head) * D
    first = tl.load(row + one, mask=in_pair, other=0.0).to(tl.float32)
    second = tl.load(row + two, mask=in_pair, other=0.0).to(tl.float32)
    tail = tl.load(row + rest, mask=in_rest, other=0.0).to(tl.float32)
    angle = tl.load(positions_ptr + token).to(tl.int64) * HALF_ROT + pair
    cos = tl.where(rotated, tl.load(cos_ptr + angle, mask=pair < HALF_ROT, other=1.0), 1.0)
    sin = tl.where(rotated, tl.load(sin_ptr + angle, mask=pair < HALF_ROT, other=0.0), 0.0)
    first, second = first * cos - second * sin, second * cos + first * sin

    is_q = head < Q_HEADS
    target = out_ptr + (token * Q_HEADS + head) * D
    tl.store(target + one, first.to(out_ptr.dtype.element_ty), mask=in_pair & is_q)
    tl.store(target + two, second.to(out_ptr.dtype.element_ty), mask=in_pair & is_q)
    tl.store(target + rest, tail.to(out_ptr.dtype.element_ty), mask=in_rest & is_q)

    slot = tl.load(slots_ptr + token).to(tl.int64)
    plane = head - Q_HEADS  # K heads, then V heads: as the planes of a block
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    stored = known & (plane >= 0) & (slot >= 0)
    scale = 1.0
    if FORMAT > 0:
        bits = tl.maximum(tl.maximum(_largest(first), _largest(second)), _largest(tail))[:, None]
        fixed = tl.where(rotated, key_scale, value_scale)
        scale = _scale_of(bits, fixed, smallest, FIXED, FORMAT)
        tl.store(scales_ptr + block * scales_stride + plane * BLOCK_SIZE + offset, scale, mask=stored)
    at = block * kv_stride + (plane * BLOCK_SIZE + offset) * D
    _write(first, at + one, in_pair & stored, kv_ptr, scale, FORMAT)
    _write(second, at + two, in_pair & stored, kv_ptr, scale, FORMAT)
    _write(tail, at + rest, in_rest & stored, kv_ptr, scale, FORMAT)


def rope_launch(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_layer: torch.Tensor,
    out: torch.Tensor,
    interleaved: bool,
    kv_scales: torch.Tensor | None,
    form: int,
    fixed_scales: tuple[float, float] | None = None,
) -> Launch:
    """The launch of one rotation and write."""
    tokens, heads, dim = out.shape
    kv_heads, block_size = kv_layer.shape[2:4]
    half = cos.shape[1]
    return Launch(
        _rope_and_store,
        (tokens, -(-(heads + 2 * kv_heads) // HEADS)),
        {
            "qkv_ptr": qkv,
            "positions_ptr": positions,
            "slots_ptr": slots,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "kv_ptr": kv_layer.view(torch.uint8) if form == FP8 else kv_layer,
            "scales_ptr": cos if kv_scales is None else kv_scales,
            "out_ptr": out,
            "kv_stride": kv_layer.stride(0),
            "scales_stride": 0 if kv_scales is None else kv_scales.stride(0),
            "key_scale": 1.0 if fixed_scales is None else fixed_scales[0],
            "value_scale": 1.0 if fixed_scales is None else fixed_scales[1],
            "smallest": torch.finfo(torch.float32).tiny,
        },
        {
            "Q_HEADS": heads,
            "KV_HEADS": kv_heads,
            "D": dim,
            "HALF_ROT": half,
            "BLOCK_HALF": int(triton.next_power_of_2(half)),
            "BLOCK_REST": int(triton.next_power_of_2(max(1, dim - 2 * half))),
            "BLOCK_SIZE": block_size,
            "HEADS": HEADS,
            "INTERLEAVED": interleaved,
            "FORMAT": form,
            "FIXED": fixed_scales is not None,
        },
        num_warps=1 if dim <= 128 else 2,
    )


def rope_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_layer: torch.Tensor,
    num_heads: int,
    *,
    interleaved: bool = False,
    kv_scales: torch.Tensor | None = None,
    fixed_scales: tuple[float, float] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate q and k, write k and v to their slots, return q [T, Hq, D] in the dtype of qkv (in `out` if given).

    qkv [T, (Hq + 2 * Hkv) * D] 16 bits or float32: q heads, k heads, v heads. positions, slots [T] int64; slot = block
    * block_size + offset, no slot twice; a negative slot writes nothing (a row of padding). cos, sin [max_positions,
    rot / 2] float32: the first `rot` elements of a head are rotated, in pairs (i, i + rot/2), or (2i, 2i + 1) when
    `interleaved`. kv_layer = cache[:, layer] with `kv_scales` as `kernels.triton.kv_format` says, which are written
    too: each row's own, or `fixed_scales` of keys and of values. Raises InternalError for wrong shapes or dtypes.
    """
    require(qkv.dim() == 2 and qkv.dtype in FLOATS and qkv.is_contiguous(), "qkv", qkv, "contiguous [T, width]")
    tokens, dim = qkv.shape[0], kv_layer.shape[-1]
    form = check_kv(kv_layer, kv_scales, qkv.dtype, dim, qkv)
    width = (num_heads + 2 * kv_layer.shape[2]) * dim
    require(qkv.shape[1] == width, "qkv", qkv, f"[T, {width}]")
    require_dense("positions", positions, (tokens,), (torch.int64,), qkv)
    require_dense("slots", slots, (tokens,), (torch.int64,), qkv)
    require(cos.dim() == 2 and 0 < 2 * cos.shape[1] <= dim, "cos", cos, f"[max_positions, rot / 2 <= {dim // 2}]")
    for name, table in (("cos", cos), ("sin", sin)):
        require_dense(name, table, tuple(cos.shape), (torch.float32,), qkv)
    if out is None:
        out = torch.empty((tokens, num_heads, dim), dtype=qkv.dtype, device=qkv.device)
    else:
        require_dense("out", out, (tokens, num_heads, dim), (qkv.dtype,), qkv)
    step = (qkv, positions, slots, cos, sin, kv_layer, out)
    rope_launch(*step, interleaved, kv_scales, form, fixed_scales).run()
    return out


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
    fixed_scales: tuple[float, float] | None = None,
) -> torch.Tensor:
    """Do what `rope_and_store` does, by torch in float32; q is returned in float32."""
    num_kv_heads, block_size, dim = kv_layer.shape[2:]
    heads = qkv.float().view(qkv.shape[0], num_heads + 2 * num_kv_heads, dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    angles = cos[positions], sin[positions]
    values = torch.stack([rotate_reference(k, *angles, interleaved), v], 1)[slots >= 0]  # [tokens, 2, Hkv, D]
    kept = slots[slots >= 0]
    blocks, offsets, form = kept // block_size, kept % block_size, kv_format(kv_layer)
    if form == HALF or kv_scales is None:
        kv_layer[blocks, :, :, offsets] = values.to(kv_layer.dtype)
        return rotate_reference(q, *angles, interleaved)
    dtype = torch.float8_e4m3fn if form == FP8 else torch.int8
    for part in (0, 1):
        codes, scales = quantize_rows(values[:, part], dtype, None if fixed_scales is None else fixed_scales[part])
        kv_layer.view(torch.uint8)[blocks, part, :, offsets] = codes.view(torch.uint8)
        kv_scales[blocks, part, :, offsets] = scales
    return rotate_reference(q, *angles, interleaved)
