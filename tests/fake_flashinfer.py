"""FlashInfer's two wrappers with the real parameters, but for the last optional ones, on any device of torch."""

from __future__ import annotations

from typing import Any

import torch
from attention_packages import refuse
from fake_flashinfer_plan import Wrapper

__all__ = ["BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"]
CORE_GROUPS = {1, 2, 3, 4, 8}
"""Query heads a KV head, without tensor cores."""


# fmt: off
class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    def __init__(self, float_workspace_buffer: Any, kv_layout: str = "NHD", use_cuda_graph: bool = False,
                 use_tensor_cores: bool = False, paged_kv_indptr_buffer: Any = None,
                 paged_kv_indices_buffer: Any = None, paged_kv_last_page_len_buffer: Any = None,
                 backend: str = "auto", jit_args: Any = None) -> None:
        fixed = {"indptr": paged_kv_indptr_buffer, "indices": paged_kv_indices_buffer,
                 "last": paged_kv_last_page_len_buffer}
        self.open(float_workspace_buffer, kv_layout, fixed if use_cuda_graph else None)
        if self._fixed is not None:
            self._fixed["starts"] = torch.arange(len(fixed["indptr"]), dtype=torch.int32, device=self.device)
        self._tensor_cores = use_tensor_cores

    def plan(self, indptr: Any, indices: Any, last_page_len: Any, num_qo_heads: int, num_kv_heads: int, head_dim: int,
             page_size: int, *, pos_encoding_mode: str = "NONE", window_left: int = -1, logits_soft_cap: Any = None,
             q_data_type: Any = "float16", kv_data_type: Any = None, data_type: Any = None, sm_scale: Any = None,
             rope_scale: Any = None, rope_theta: Any = None, non_blocking: bool = True) -> None:
        refuse(not self._tensor_cores and num_qo_heads // num_kv_heads not in CORE_GROUPS, "no kernel for the group")
        starts = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        self.keep(starts, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
                   q_data_type=q_data_type, kv_data_type=kv_data_type, sm_scale=sm_scale, window_left=window_left,
                   logits_soft_cap=logits_soft_cap, causal=False)


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    def __init__(self, float_workspace_buffer: Any, kv_layout: str = "NHD", use_cuda_graph: bool = False,
                 qo_indptr_buf: Any = None, paged_kv_indptr_buf: Any = None, paged_kv_indices_buf: Any = None,
                 paged_kv_last_page_len_buf: Any = None, custom_mask_buf: Any = None, mask_indptr_buf: Any = None,
                 backend: str = "auto", jit_args: Any = None, jit_kwargs: Any = None) -> None:
        refuse(use_cuda_graph, "prefill steps are not captured")
        self.open(float_workspace_buffer, kv_layout, None)

    def plan(self, qo_indptr: Any, paged_kv_indptr: Any, paged_kv_indices: Any, paged_kv_last_page_len: Any,
             num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, head_dim_vo: int | None = None,
             custom_mask: Any = None, packed_custom_mask: Any = None, causal: bool = False,
             pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False, sm_scale: Any = None,
             window_left: int = -1, logits_soft_cap: Any = None, rope_scale: Any = None, rope_theta: Any = None,
             q_data_type: Any = "float16", kv_data_type: Any = None, non_blocking: bool = True) -> None:
        self.keep(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
                   head_dim_qk, page_size, q_data_type=q_data_type, kv_data_type=kv_data_type, sm_scale=sm_scale,
                   window_left=window_left, logits_soft_cap=logits_soft_cap, causal=causal)
