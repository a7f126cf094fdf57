"""Decode attention: one query a sequence over its paged keys and values, in splits that are reduced afterwards.

Source: flash-decoding (Dao et al., 2023) over paged keys and values (Kwon et al., 2023). The heads of a group share
each tile that is read. Splits and tiles lie at fixed absolute positions, so with one `max_context` a row's bits do not
depend on the other sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.attention_tiles import attend, cache_arguments, load_tile, score_arguments, shape_constants
from kernels.triton.kv_format import HALF
from kernels.triton.launch import Launch, target

MOST_SPLITS = 64
SHORTEST_SPLIT = 256
HOPPER = 90
"""From there on loads go two stages deep; before it that spills registers."""


@triton.jit
def _decode_split(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    contexts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_in: tl.tensor,
    scale_out: tl.tensor,
    window: tl.tensor,
    kv_stride: tl.tensor,
    scales_stride: tl.tensor,
    table_width: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    FORMAT: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> None:
    """out [S, Hq, SPLITS, D] in float32 with weight [S, Hq, SPLITS] (log2 of the sum), or with one split the result."""
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts_ptr + sequence)
    oldest = 0
    if WINDOWED:
        oldest = tl.maximum(context - window, 0)
    begin = tl.maximum(split * SPLIT, oldest // TILE * TILE)
    end = tl.minimum(split * SPLIT + SPLIT, context)
    if SPLITS > 1 and begin >= end:
        return
    members, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (members < GROUP)[:, None] & (dims < D)[None, :]
    rows = sequence * KV_HEADS * GROUP + head * GROUP + members
    q = tl.load(q_ptr + rows[:, None] * D + dims[None, :], mask=mask, other=0.0)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, end, TILE):
        positions = start + tl.arange(0, TILE)
        inside = (positions < end) & (positions >= oldest)
        blocks = tl.load(tables_ptr + sequence * table_width + positions // BLOCK_SIZE, mask=inside, other=0)
        blocks, offsets = blocks.to(tl.int64), positions % BLOCK_SIZE
        k, k_scale = load_tile(
            kv_ptr, scales_ptr, blocks, offsets, inside, head, kv_stride, scales_stride,
            0, KV_HEADS, D, BLOCK_D, BLOCK_SIZE, FORMAT, q.dtype,
        )  # fmt: skip
        v, v_scale = load_tile(
            kv_ptr, scales_ptr, blocks, offsets, inside, head, kv_stride, scales_stride,
            1, KV_HEADS, D, BLOCK_D, BLOCK_SIZE, FORMAT, q.dtype,
        )  # fmt: skip
        best, total, acc = attend(
            q, k, k_scale, v, v_scale, inside[None, :], best, total, acc, scale_in, scale_out, FORMAT, CAPPED
        )
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    rows = rows * SPLITS + split
    tl.store(out_ptr + rows[:, None] * D + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    if SPLITS > 1:
        tl.store(weight_ptr + rows, best + tl.log2(total), mask=members < GROUP)


@triton.jit
def _decode_reduce(
    partial_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    contexts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    window: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> None:
    """Weigh the splits of one head. Splits that hold nothing were not written and are not read."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    context = tl.load(contexts_ptr + sequence)
    first = 0
    if WINDOWED:
        first = tl.maximum(context - window, 0) // TILE * TILE // SPLIT
    row, dims = sequence * HEADS + head, tl.arange(0, BLOCK_D)
    best, total = float("-inf"), 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(first, tl.cdiv(context, SPLIT)):
        weight = tl.load(weight_ptr + row * SPLITS + split)
        part = tl.load(partial_ptr + (row * SPLITS + split) * D + dims, mask=dims < D, other=0.0)
        higher = tl.maximum(best, weight)
        shrink, share = tl.exp2(best - higher), tl.exp2(weight - higher)
        acc = acc * shrink + part * share
        total = total * shrink + share
        best = higher
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * D + dims, acc.to(out_ptr.dtype.element_ty), mask=dims < D)


def split_length(max_context: int) -> int:
    """Positions of a split, a power of two: at most MOST_SPLITS of them, none shorter than SHORTEST_SPLIT."""
    return max(SHORTEST_SPLIT, int(triton.next_power_of_2(-(-max_context // MOST_SPLITS))))


def decode_launches(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    max_context: int,
    sliding_window: int | None,
    soft_cap: float | None,
    kv_scales: torch.Tensor | None,
    form: int,
    split: int | None = None,
) -> list[Launch]:
    """The launches of one decode attention: the splits, and their reduction when there are several."""
    sequences, heads, dim = q.shape
    kv_heads = kv_layer.shape[2]
    block_d = max(16, triton.next_power_of_2(dim))
    tile = 64 if block_d <= 128 and form == HALF else 32
    split = split or split_length(max_context)
    splits = max(1, -(-max_context // split))
    device = q.device
    several = splits > 1
    partial = torch.empty((sequences, heads, splits, dim), dtype=torch.float32, device=device) if several else out
    weights = torch.empty((sequences, heads, splits) if several else (1,), dtype=torch.float32, device=device)
    main = Launch(
        _decode_split,
        (sequences, kv_heads, splits),
        {
            "q_ptr": q,
            "contexts_ptr": context_lens,
            "out_ptr": partial,
            "weight_ptr": weights,
            **cache_arguments(kv_layer, block_tables, kv_scales, weights),
            **score_arguments(scale, soft_cap, sliding_window),
        },
        {
            **shape_constants(heads, kv_layer, form, soft_cap, sliding_window),
            "BLOCK_M": max(16, triton.next_power_of_2(heads // kv_heads)),
            "TILE": tile,
            "SPLIT": split,
            "SPLITS": splits,
        },
        num_warps=4,
        num_stages=3 if form == HALF and target().backend == "cuda" and target().arch < HOPPER else 2,
    )
    if not several:
        return [main]
    return [main, _reduction(partial, weights, context_lens, out, sliding_window, split, block_d, tile)]


def _reduction(
    partial: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    sliding_window: int | None,
    split: int,
    block_d: int,
    tile: int,
) -> Launch:
    """Joins the splits of `partial` [S, Hq, splits, D] by their `weights` [S, Hq, splits]."""
    sequences, heads, splits, dim = partial.shape
    return Launch(
        _decode_reduce,
        (sequences, heads),
        {
            "partial_ptr": partial,
            "weight_ptr": weights,
            "contexts_ptr": context_lens,
            "out_ptr": out,
            "window": sliding_window or 0,
        },
        {
            "HEADS": heads,
            "D": dim,
            "BLOCK_D": block_d,
            "TILE": tile,
            "SPLIT": split,
            "SPLITS": splits,
            "WINDOWED": sliding_window is not None,
        },
        num_warps=2,
    )
