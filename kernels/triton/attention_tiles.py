"""What decode and prefill attention share: one tile of keys and values, read through the block table, and one step of
the online softmax over it.

Scores are kept in powers of two: exp(x) = exp2(x * log2(e)), and log2(e) is part of the scale that the host passes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.triton.kv_format import decode_e4m3, readable

LOG2_E = math.log2(math.e)


def softmax_scales(scale: float, soft_cap: float | None) -> tuple[float, float]:
    """(factor of the products, factor after the tanh): the second counts with a soft cap only."""
    if soft_cap is None:
        return scale * LOG2_E, 1.0
    return scale / soft_cap, soft_cap * LOG2_E


def cache_arguments(
    kv_layer: torch.Tensor, block_tables: torch.Tensor, kv_scales: torch.Tensor | None, stand_in: torch.Tensor
) -> dict[str, object]:
    """What both attentions are told of the paged cache; `stand_in` is what they are given for scales it hasn't got."""
    return {
        "kv_ptr": readable(kv_layer),
        "scales_ptr": stand_in if kv_scales is None else kv_scales,
        "tables_ptr": block_tables,
        "kv_stride": kv_layer.stride(0),
        "scales_stride": 0 if kv_scales is None else kv_scales.stride(0),
        "table_width": block_tables.shape[1],
    }


def score_arguments(scale: float, soft_cap: float | None, sliding_window: int | None) -> dict[str, object]:
    """What both attentions are told of scores: `softmax_scales`, and the window (0: none)."""
    scale_in, scale_out = softmax_scales(scale, soft_cap)
    return {"scale_in": scale_in, "scale_out": scale_out, "window": sliding_window or 0}


def shape_constants(
    heads: int, kv_layer: torch.Tensor, form: int, soft_cap: float | None, sliding_window: int | None
) -> dict[str, object]:
    """The constants that both attentions are compiled for."""
    kv_heads, block_size, dim = kv_layer.shape[2:5]
    return {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "D": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_SIZE": block_size,
        "FORMAT": form,
        "CAPPED": soft_cap is not None,
        "WINDOWED": sliding_window is not None,
    }


@triton.jit
def load_tile(
    kv_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    blocks: tl.tensor,
    offsets: tl.tensor,
    inside: tl.tensor,
    head: tl.tensor,
    kv_stride: tl.tensor,
    scales_stride: tl.tensor,
    VALUES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Keys [BLOCK_D, TILE] or values [TILE, BLOCK_D] in DTYPE, and the scales of codes [TILE].

    blocks int64 and offsets [TILE] say where the positions are; what is outside or beyond D is 0.
    """
    dims = tl.arange(0, BLOCK_D)
    plane = (VALUES * KV_HEADS + head) * BLOCK_SIZE
    where = blocks * kv_stride + (plane + offsets) * D
    if VALUES:
        mask = inside[:, None] & (dims < D)[None, :]
        tile = tl.load(kv_ptr + where[:, None] + dims[None, :], mask=mask, other=0.0)
    else:
        mask = inside[None, :] & (dims < D)[:, None]
        tile = tl.load(kv_ptr + where[None, :] + dims[:, None], mask=mask, other=0.0)
    scale = 1.0
    if FORMAT == 1:
        tile = decode_e4m3(tile)
    if FORMAT > 0:
        scale = tl.load(scales_ptr + blocks * scales_stride + plane + offsets, mask=inside, other=0.0)
    return tile.to(DTYPE), scale


@triton.jit
def attend(
    q: tl.tensor,
    k: tl.tensor,
    k_scale: tl.tensor,
    v: tl.tensor,
    v_scale: tl.tensor,
    visible: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    scale_in: tl.tensor,
    scale_out: tl.tensor,
    FORMAT: tl.constexpr,
    CAPPED: tl.constexpr,
) -> tl.tensor:
    """Take one tile into the running (best [M], total [M], acc [M, BLOCK_D]); visible [M, TILE]."""
    scores = tl.dot(q, k, input_precision="ieee") * scale_in
    if FORMAT > 0:
        scores *= k_scale[None, :]
    if CAPPED:
        scores = scale_out * (1.0 - 2.0 / (tl.exp(2.0 * scores) + 1.0))  # tanh; 1 for an infinite exp
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    pivot = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    weights = tl.exp2(scores - pivot[:, None])
    shrink = tl.exp2(best - pivot)
    total = total * shrink + tl.sum(weights, 1)
    if FORMAT > 0:
        weights *= v_scale[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc
