"""Causal grouped-query attention over the paged KV cache: decode and chunked prefill in one call.

Source: online softmax, Milakov and Gimelshein (2018), in tiles as FlashAttention (Dao et al., 2022); paged keys and
values as vLLM (Kwon et al., 2023). C++: attention.cpp walks over absolute tiles of 64 positions, so that a row's bits
depend only on its query and on the keys and values it sees: not on the other rows, chunking, block size or thread
count.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from kernels import build, check, dispatch
from kernels.kv_codes import FORMATS, check_scales, dequantize_rows
from kernels.kv_order import PAIRED, PLAIN, check_order
from tandem.errors import InternalError

MAX_HEAD_DIM = 256
MAX_GROUP = 96


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load_library("attention.cpp")
    assert lib is not None, "the cpp implementation is selected only when its libraries load"
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    lib.tandem_paged_attention.argtypes = [pointer] * 7 + [i64] * 11 + [ctypes.c_float, i32, i32, i32, i32]
    lib.tandem_paged_attention.restype = i64
    return lib


def paged_attention(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    out: torch.Tensor | None = None,
    *,
    kv_scales: torch.Tensor | None = None,
    rounded: bool = False,
    order: str = PLAIN,
) -> torch.Tensor:
    """Return attention [T, Hq, D] float32 for the queries of S sequences, whose keys and values are in the cache
    already.

    q [T, Hq, D] float32. kv_layer = cache[:, layer], [blocks, 2, Hkv, block_size, D], float32 or bfloat16, or int8
    or float8_e4m3fn with `kv_scales` [blocks, 2, Hkv, block_size] (`kernels.kv_codes`). block_tables [S, max_blocks]
    int32. query_starts [S + 1] int32: sequence s has rows query_starts[s] to query_starts[s + 1] (none
    is allowed). context_lens [S] int32: KV length after this step. Row i of sequence s sits at position context_len -
    query_len + i and sees positions up to its own, of these the last `sliding_window` when given. D a multiple of 8, at
    most 256; Hq a multiple of Hkv. `out` must not overlap q. `rounded` allows queries and softmax weights to be rounded
    to bfloat16, which is faster with a cache of at most 16 bits where the CPU multiplies bfloat16 (attention_bf16.h).
    `order` is the cache's (`kernels.kv_order`); paired goes with `rounded` only.

    Raises InternalError for wrong shapes, dtypes or orders, impossible lengths, or a needed block that is outside the
    cache.
    """
    check_order(order, kv_layer.dtype, kv_layer.shape[-2], kv_layer.shape[-1])
    if order == PAIRED and not rounded:
        raise InternalError("a cache in paired order needs rounded attention")
    block_stride, block_size = _check_shapes(q, kv_layer, block_tables, query_starts, context_lens, sliding_window)
    scales_stride = check_scales(kv_layer, kv_scales)
    if out is None:
        out = torch.empty_like(q)
    else:
        check.dense("out", out, tuple(q.shape))
    if dispatch.select().name != "cpp":
        _check_lengths(q, kv_layer, block_tables, query_starts, context_lens, sliding_window)
        step = (q, kv_layer, block_tables, query_starts, context_lens)
        return out.copy_(paged_attention_reference(*step, scale, sliding_window, kv_scales))
    tensors = (q, kv_layer, kv_scales, block_tables, query_starts, context_lens, out)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    tokens, heads, dim = q.shape
    sequences, max_blocks = block_tables.shape
    blocks, kv_heads = kv_layer.shape[0], kv_layer.shape[2]
    sizes = (sequences, tokens, heads, kv_heads, dim, blocks, block_size, block_stride, max_blocks, scales_stride)
    how = (sliding_window or 0, scale, FORMATS[kv_layer.dtype], rounded, order == PAIRED)
    bad = _library().tandem_paged_attention(*pointers, *sizes, *how, torch.get_num_threads())
    if bad >= 0:
        raise _impossible(bad)
    return out


def _check_shapes(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    sliding_window: int | None,
) -> tuple[int, int]:
    """Check everything but lengths and block numbers; return (block stride, block size)."""
    if q.dim() != 3:
        raise check.fail("q", q, "[T, heads, head_dim]")
    heads, dim = q.shape[1], q.shape[2]
    check.dense("q", q, tuple(q.shape))
    kv_heads = kv_layer.shape[2] if kv_layer.dim() == 5 else 0
    geometry = check.kv_layer(kv_layer, kv_heads, dim)
    if kv_heads < 1 or heads % kv_heads or not 1 <= heads // kv_heads <= MAX_GROUP:
        raise InternalError(f"{heads} query heads must be 1 to {MAX_GROUP} times the {kv_heads} KV heads")
    if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
        raise InternalError(f"head_dim {dim} must be a multiple of 8, at most {MAX_HEAD_DIM}")
    if sliding_window is not None and sliding_window < 1:
        raise InternalError(f"sliding_window {sliding_window} must be at least 1")
    if block_tables.dim() != 2:
        raise check.fail("block_tables", block_tables, "[sequences, max_blocks]")
    sequences = block_tables.shape[0]
    check.dense("block_tables", block_tables, (sequences, block_tables.shape[1]), torch.int32)
    check.vector("context_lens", context_lens, torch.int32, sequences)
    check.vector("query_starts", query_starts, torch.int32, sequences + 1)
    return geometry


def _impossible(sequence: int) -> InternalError:
    return InternalError(
        f"sequence {sequence}: its query_starts, context_len and block_tables do not fit together or leave the cache"
    )


def _check_lengths(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    window: int | None,
) -> None:
    """Check what the C++ kernel checks itself."""
    starts, contexts, block_size = query_starts.tolist(), context_lens.tolist(), kv_layer.shape[3]
    if starts[0] != 0 or starts[-1] != q.shape[0]:
        raise _impossible(0)
    for s, context in enumerate(contexts):
        queries = starts[s + 1] - starts[s]
        needed = -(-context // block_size)
        if queries < 0 or context < queries or needed > block_tables.shape[1]:
            raise _impossible(s)
        oldest = max(0, context - queries - window + 1) if window else 0
        blocks = block_tables[s, oldest // block_size : needed]
        if queries and bool(((blocks < 0) | (blocks >= kv_layer.shape[0])).any()):
            raise _impossible(s)


def paged_attention_reference(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    kv_scales: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Do what `paged_attention` does, by torch: gathers each sequence's keys and values. Computes in the dtype of q.

    `soft_cap` c, which GPUs alone have: scores become c * tanh(score / c).
    """
    out = torch.empty_like(q)
    starts = query_starts.tolist()
    block_size = kv_layer.shape[3]
    for s, context in enumerate(context_lens.tolist()):
        begin, end = starts[s], starts[s + 1]
        if begin == end:
            continue
        query_positions = torch.arange(context - (end - begin), context, device=q.device)
        oldest = max(0, int(query_positions[0]) - sliding_window + 1) if sliding_window else 0
        positions = torch.arange(oldest, context, device=q.device)
        blocks, offsets = block_tables[s][positions // block_size].long(), positions % block_size
        # A byte view: not every operation of torch takes 8-bit floats.
        codes = kv_layer if kv_scales is None else kv_layer.view(torch.uint8)
        gathered = codes[blocks, :, :, offsets].view(kv_layer.dtype)
        scales = None if kv_scales is None else kv_scales[blocks, :, :, offsets]
        keys, values = dequantize_rows(gathered, scales, q.dtype).unbind(1)  # [positions, Hkv, D] each
        hidden = positions[None] > query_positions[:, None]
        if sliding_window:
            hidden |= positions[None] <= query_positions[:, None] - sliding_window
        group = q.shape[1] // keys.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], keys.repeat_interleave(group, 1)) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1))
    return out
