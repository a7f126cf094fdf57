"""FlashAttention 3's function for paged caches with its real signature, on any device of torch."""

from __future__ import annotations

from typing import Any

import torch
from attention_packages import attend, opaque, refuse
from torch import Tensor

__all__ = ["flash_attn_with_kvcache"]


@opaque
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, *step: Any) -> Tensor:
    """q [T, Hq, D] over keys and values [blocks, block_size, Hkv, D]; used by the fake of version 2 too."""
    lengths, table, options = step
    out = torch.zeros_like(q)
    for s, length in enumerate(lengths.tolist()):
        k, v = (cache[table[s].long()].flatten(0, 1)[:length] for cache in (keys, values))
        out[starts[s] : starts[s + 1]] = attend(q[starts[s] : starts[s + 1]], k, v, *options).to(q.dtype)
    return out


def check(q: Tensor, keys: Tensor, values: Tensor, *arrays: Tensor) -> None:
    """What both versions check of a paged cache, and of arrays of int32 on its device; the first is the table."""
    refuse(q.dtype not in (torch.float16, torch.bfloat16), "FlashAttention only supports fp16 and bf16 data type")
    refuse({keys.dtype, values.dtype} != {q.dtype}, "query, key and value must have the same dtype")
    refuse(keys.dim() != 4 or keys.shape != values.shape or keys.shape[3] != q.shape[-1], "wrong shape of the cache")
    refuse(q.shape[-1] > 256 or q.shape[-1] % 8 or q.shape[-2] % keys.shape[2], "no kernel for such heads")
    refuse(keys.stride(-1) != 1 or values.stride(-1) != 1, "the cache must have contiguous last dimension")
    refuse(any(one.dtype is not torch.int32 for one in arrays), "lengths and tables must have dtype torch.int32")
    refuse(any(one.device != q.device for one in arrays), "lengths and tables must be on the GPU")
    refuse(any(one.stride(-1) != 1 for one in arrays), "lengths and tables must be contiguous")
    refuse(arrays[0].dim() != 2, "the table has a row for each sequence")


# fmt: off
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any = None, v: Any = None, qv: Any = None, rotary_cos: Any = None,
    rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None,
    page_table: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None, max_seqlen_q: int | None = None,
    rotary_seqlens: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
    softmax_scale: Any = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0,
    softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Any = None, num_splits: int = 0,
    pack_gqa: Any = None, sm_margin: int = 0, return_softmax_lse: bool = False,
) -> Tensor:
    # fmt: on
    check(q, k_cache, v_cache, page_table, cache_seqlens)
    sequences = len(cache_seqlens)
    refuse(len(page_table) != sequences, "page_table must have a row for each of cache_seqlens")
    refuse(window_size[0] >= 0 and window_size[1] != 0, "a causal window ends at the query")
    options = (softmax_scale, window_size[0], softcap, causal)
    if cu_seqlens_q is None:
        refuse(q.dim() != 4 or len(q) != sequences or q.shape[1] != 1, "q is [batch_size, seqlen, nheads, headdim]")
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=q.device)
        return paged_attention(q[:, 0], k_cache, v_cache, starts, cache_seqlens, page_table, options)[:, None]
    check(q, k_cache, v_cache, page_table, cu_seqlens_q)
    refuse(q.dim() != 3 or len(cu_seqlens_q) != sequences + 1, "q is [total_q, nheads, headdim] with cu_seqlens_q")
    refuse(max_seqlen_q != int(cu_seqlens_q.diff().max()), "max_seqlen_q must be provided if cu_seqlens_q is provided")
    return paged_attention(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, options)
