"""Chunked-prefill attention: any number of queries a sequence, over all of its paged keys and values, causal with an
offset.

Source: FlashAttention 2 (Dao, 2023) over paged keys and values (Kwon et al., 2023). A program takes some queries of one
sequence and all query heads of one KV head: rows are (query, head of the group). Which sequence is found by bisection,
so the grid depends on counts only and nothing is read back from the GPU. Tiles lie at fixed absolute positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.triton.attention_tiles import attend, cache_arguments, load_tile, score_arguments, shape_constants
from kernels.triton.kv_format import HALF
from kernels.triton.launch import Launch, target


@triton.jit
def _prefill(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    contexts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_in: tl.tensor,
    scale_out: tl.tensor,
    window: tl.tensor,
    sequences: tl.tensor,
    kv_stride: tl.tensor,
    scales_stride: tl.tensor,
    table_width: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> None:
    """Sequence s has the programs from query_starts[s] // BLOCK_Q + s on; one in excess finds no query."""
    program, head = tl.program_id(0), tl.program_id(1)
    low, high = program * 0, sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // BLOCK_Q + middle <= program:
            low = middle + 1
        else:
            high = middle
    sequence = low - 1
    start = tl.load(starts_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - start
    first = (program - (start // BLOCK_Q + sequence)) * BLOCK_Q
    if first >= count:
        return
    context = tl.load(contexts_ptr + sequence)
    members, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    queries = first + members // GROUP
    alive = (members < BLOCK_Q * GROUP) & (queries < count)
    seen_to = tl.where(alive, context - count + queries, -1)
    rows = (queries * KV_HEADS + head) * GROUP + members % GROUP
    mask = alive[:, None] & (dims < D)[None, :]
    chunk = start.to(tl.int64) * (KV_HEADS * GROUP * D)
    q = tl.load(q_ptr + chunk + rows[:, None] * D + dims[None, :], mask=mask, other=0.0)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(context - count + first - window + 1, 0) // TILE * TILE
    end = context - count + tl.minimum(first + BLOCK_Q, count)
    table = tables_ptr + sequence.to(tl.int64) * table_width
    for base in range(begin, end, TILE):
        positions = base + tl.arange(0, TILE)
        inside = positions < end
        if WINDOWED:  # blocks before the window may be gone: their table entries are not read
            inside = inside & (positions > context - count + first - window)
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        offsets = positions % BLOCK_SIZE
        k, k_scale = load_tile(
            kv_ptr, scales_ptr, blocks, offsets, inside, head, kv_stride, scales_stride,
            0, KV_HEADS, D, BLOCK_D, BLOCK_SIZE, FORMAT, q.dtype,
        )  # fmt: skip
        v, v_scale = load_tile(
            kv_ptr, scales_ptr, blocks, offsets, inside, head, kv_stride, scales_stride,
            1, KV_HEADS, D, BLOCK_D, BLOCK_SIZE, FORMAT, q.dtype,
        )  # fmt: skip
        visible = positions[None, :] <= seen_to[:, None]
        if WINDOWED:
            visible = visible & (positions[None, :] > seen_to[:, None] - window)
        best, total, acc = attend(
            q, k, k_scale, v, v_scale, visible, best, total, acc, scale_in, scale_out, FORMAT, CAPPED
        )
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + chunk + rows[:, None] * D + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def _shape(group: int, tokens: int, sequences: int, block_d: int, form: int) -> tuple[int, int, int]:
    """(rows of a program, positions of a tile, warps), so that no registers are spilled: docs/gpu.md has the table.

    Rows are few where chunks are short, but there is always room for one query's group.
    """
    least = max(16, triton.next_power_of_2(group))
    if target().backend == "interpreter" or tokens * group < 64 * sequences:
        return least, 64 if block_d <= 128 and form == HALF else 32, 4 if least < 128 else 8
    if target().arch == 90:  # wgmma reads its operands from shared memory
        return 128, 64 if block_d <= 128 else 32, 8
    small = block_d > 128 or (form != HALF and block_d > 64)
    rows = max(least, 64 if small else 128)
    return rows, 32 if small else 64, 8 if rows >= 128 or (block_d > 128 and target().arch == 80) else 4


def prefill_launch(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    kv_scales: torch.Tensor | None,
    form: int,
) -> Launch:
    """The launch of one chunked-prefill attention."""
    tokens, heads, dim = q.shape
    kv_heads = kv_layer.shape[2]
    sequences = context_lens.shape[0]
    group = heads // kv_heads
    block_d = max(16, triton.next_power_of_2(dim))
    block_m, tile, warps = _shape(group, tokens, sequences, block_d, form)
    block_q = block_m // group
    return Launch(
        _prefill,
        (tokens // block_q + sequences if tokens else 0, kv_heads),
        {
            "q_ptr": q,
            "starts_ptr": query_starts,
            "contexts_ptr": context_lens,
            "out_ptr": out,
            "sequences": sequences,
            **cache_arguments(kv_layer, block_tables, kv_scales, q),
            **score_arguments(scale, soft_cap, sliding_window),
        },
        {
            **shape_constants(heads, kv_layer, form, soft_cap, sliding_window),
            "BLOCK_Q": block_q,
            "BLOCK_M": block_m,
            "TILE": tile,
        },
        num_warps=warps,
        num_stages=3 if target().backend == "cuda" and form == HALF and block_d <= 128 else 2,
    )
