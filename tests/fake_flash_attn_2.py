"""FlashAttention 2's functions for paged caches with their real signatures, on any device of torch."""

from __future__ import annotations

from typing import Any

import torch
from attention_packages import refuse
from fake_flash_attn_3 import check, paged_attention
from torch import Tensor

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache"]
PAGE_MULTIPLE = 256


def _check_pages(keys: Tensor, table: Tensor, sequences: int) -> None:
    refuse(keys.shape[1] % PAGE_MULTIPLE, f"Paged KV cache block size must be divisible by {PAGE_MULTIPLE}")
    refuse(len(table) != sequences, "block_table must have a row for each sequence")


# fmt: off
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any = None, v: Any = None, rotary_cos: Any = None,
    rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None,
    block_table: Any = None, softmax_scale: Any = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Any = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    # fmt: on
    check(q, k_cache, v_cache, block_table, cache_seqlens)
    _check_pages(k_cache, block_table, len(cache_seqlens))
    refuse(q.dim() != 4 or len(q) != len(cache_seqlens) or q.shape[1] != 1, "q is [batch_size, seqlen, nheads, dim]")
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    options = (softmax_scale, window_size[0], softcap, causal)
    return paged_attention(q[:, 0], k_cache, v_cache, starts, cache_seqlens, block_table, options)[:, None]


# fmt: off
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:
    # fmt: on
    check(q, k, v, block_table, cu_seqlens_q, cu_seqlens_k)
    _check_pages(k, block_table, len(cu_seqlens_q) - 1)
    refuse(len(cu_seqlens_k) != len(cu_seqlens_q), "cu_seqlens_k is [batch_size + 1], as cu_seqlens_q")
    lengths = cu_seqlens_k.diff()
    refuse(max_seqlen_q != int(cu_seqlens_q.diff().max()), "max_seqlen_q is not the longest query")
    refuse(max_seqlen_k != int(lengths.max()), "max_seqlen_k is not the longest context")
    options = (softmax_scale, window_size[0], softcap, causal)
    return paged_attention(q, k, v, cu_seqlens_q, lengths, block_table, options)
