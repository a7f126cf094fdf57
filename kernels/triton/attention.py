"""Causal grouped-query attention over the paged KV cache on a GPU: `paged_decode` for steps of one query a sequence,
`paged_prefill` for chunks of any length.

Keys and values are float16, bfloat16, fp8 or int8 (`kernels.triton.kv_format`). Lengths and block numbers are on the
GPU and can't be checked without waiting for it: whoever builds the step vouches for them.
"""

from __future__ import annotations

import torch

from kernels.triton.decode_attention import decode_launches
from kernels.triton.kv_format import check_kv, dequantize_reference
from kernels.triton.launch import FLOATS, require, require_dense
from kernels.triton.prefill_attention import prefill_launch
from tandem.errors import InternalError

MAX_HEAD_DIM = 256
MAX_GROUP = 128


def paged_decode(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
    max_context: int,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    split: int | None = None,
) -> torch.Tensor:
    """Return attention [S, Hq, D] in the dtype of q, for the newest position of each of S sequences.

    q [S, Hq, D] float16 or bfloat16 (float32 is for tests). kv_layer = cache[:, layer], [blocks, 2, Hkv, block_size,
    D], in q's dtype or quantised with `kv_scales`. block_tables [S, max_blocks] int32. context_lens [S] int32: KV
    length after this step; 0 for a row of padding, which gives zeros. `max_context`: no context is longer (with a
    captured graph: will ever be); it fixes the grid and the splits. `soft_cap` c: scores become c * tanh(score / c).
    `split`: positions of a split, a multiple of 64, for tests.

    Raises InternalError for wrong shapes or dtypes.
    """
    form = _check(q, kv_layer, block_tables, context_lens, sliding_window, soft_cap, kv_scales)
    require(block_tables.shape[0] == q.shape[0], "block_tables", block_tables, f"of {q.shape[0]} rows, as q")
    if max_context < 1 or (split is not None and (split < 64 or split % 64)):
        raise InternalError(f"max_context {max_context} must be at least 1, split {split} a multiple of 64")
    out = _out(out, q)
    step = (q, kv_layer, block_tables, context_lens, out)
    launches = decode_launches(*step, scale, max_context, sliding_window, soft_cap, kv_scales, form, split)
    for launch in launches:
        launch.run()
    return out


def paged_prefill(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention [T, Hq, D] in the dtype of q: `kernels.attention.paged_attention` for a GPU.

    As `paged_decode`, with query_starts [S + 1] int32: sequence s has rows query_starts[s] to query_starts[s + 1] (none
    is allowed), the last of which sits at position context_lens[s] - 1. Raises InternalError as `paged_decode`.
    """
    form = _check(q, kv_layer, block_tables, context_lens, sliding_window, soft_cap, kv_scales)
    require_dense("query_starts", query_starts, (context_lens.shape[0] + 1,), (torch.int32,), q)
    out = _out(out, q)
    launch = prefill_launch(
        q, kv_layer, block_tables, query_starts, context_lens, out, scale, sliding_window, soft_cap, kv_scales, form
    )
    launch.run()
    return out


def _out(out: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
    if out is None:
        return torch.empty_like(q)
    require_dense("out", out, tuple(q.shape), (q.dtype,), q)
    return out


def _check(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    sliding_window: int | None,
    soft_cap: float | None,
    kv_scales: torch.Tensor | None,
) -> int:
    """Check everything that is known here; return the format of the cache."""
    good = q.dim() == 3 and q.dtype in FLOATS and q.is_contiguous() and q.shape[2] <= MAX_HEAD_DIM
    require(good, "q", q, f"contiguous float16, bfloat16 or float32 [T, heads, head_dim <= {MAX_HEAD_DIM}]")
    form = check_kv(kv_layer, kv_scales, q.dtype, q.shape[2], q)
    heads, kv_heads = q.shape[1], kv_layer.shape[2]
    if kv_heads < 1 or heads % kv_heads or not 1 <= heads // kv_heads <= MAX_GROUP:
        raise InternalError(f"{heads} query heads must be 1 to {MAX_GROUP} times the {kv_heads} KV heads")
    require(block_tables.dim() == 2, "block_tables", block_tables, "[sequences, max_blocks]")
    sequences = block_tables.shape[0]
    require_dense("block_tables", block_tables, (sequences, block_tables.shape[1]), (torch.int32,), q)
    require_dense("context_lens", context_lens, (sequences,), (torch.int32,), q)
    if sliding_window is not None and sliding_window < 1:
        raise InternalError(f"sliding_window {sliding_window} must be at least 1")
    if soft_cap is not None and soft_cap <= 0:
        raise InternalError(f"soft_cap {soft_cap} must be above 0")
    return form


def attention_reference(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do what `paged_prefill` does, by torch in float64 on any device: [T, Hq, D] float32."""
    kv, starts = dequantize_reference(kv_layer, kv_scales).double(), query_starts.tolist()
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    block_size, group = kv.shape[3], q.shape[1] // kv.shape[2]
    for s, context in enumerate(context_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        rows = torch.arange(context - (end - begin), context, device=q.device)
        if begin == end:
            continue
        oldest = max(0, int(rows[0]) - sliding_window + 1) if sliding_window else 0
        positions = torch.arange(oldest, context, device=q.device)
        keys, values = kv[block_tables[s].long()[positions // block_size], :, :, positions % block_size].unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].double(), keys.repeat_interleave(group, 1)) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        hidden = positions[None] > rows[:, None]
        if sliding_window:
            hidden |= positions[None] <= rows[:, None] - sliding_window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1)).float()
    return out
