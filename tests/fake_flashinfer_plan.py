"""What `fake_flashinfer`'s wrappers have in common: plans that refuse what the real ones refuse, or would compute
rubbish from, and runs that read what a step needs from the buffers."""

from __future__ import annotations

from typing import Any

import torch
from attention_packages import attend, opaque, refuse
from torch import Tensor

HEAD_DIMS, F16 = {64, 128, 256}, (torch.float16, torch.bfloat16)


@opaque
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, *step: Any) -> Tensor:
    indptr, indices, last, options = step
    out = torch.zeros_like(q)
    for s, length in enumerate(last.tolist()):
        pages = indices[indptr[s] : indptr[s + 1]].long()
        length += (len(pages) - 1) * keys.shape[2]
        k, v = (cache[pages].transpose(1, 2).flatten(0, 1)[:length] for cache in (keys, values))
        out[starts[s] : starts[s + 1]] = attend(q[starts[s] : starts[s + 1]], k, v, *options).to(q.dtype)
    return out


class Wrapper:
    _plan_info: Any = None

    def open(self, workspace: Tensor, kv_layout: str, fixed: dict[str, Any] | None) -> None:
        refuse(workspace.dtype is not torch.uint8 or workspace.data_ptr() % 16, "workspace: uint8, aligned to 16 bytes")
        refuse(kv_layout != "HND", f"this fake has no layout {kv_layout}")
        refuse(fixed and not all(map(torch.is_tensor, fixed.values())), "buffers are needed in cudagraph mode")
        refuse(fixed and len(fixed["indptr"]) != len(fixed["last"]) + 1, "indptr_buffer should be batch_size + 1")
        self.device, self._fixed = workspace.device, fixed

    def keep(self, starts: Tensor, indptr: Tensor, indices: Tensor, last: Tensor, *sizes: int, **options: Any) -> None:
        heads, kv_heads, dim, page = sizes
        host = (starts, indptr, last)
        refuse(any(one.dtype is not torch.int32 or one.dim() != 1 for one in (*host, indices)), "arrays are int32 [n]")
        refuse(any(one.device.type != "cpu" for one in host), "plan would wait for the device to read its lengths")
        refuse(indices.device != self.device, "indices of another device")
        refuse({len(starts), len(indptr)} != {len(last) + 1}, "indptr has one more than there are sequences")
        refuse((indptr.diff() < 1).any() or indptr[0] or indptr[-1] != len(indices), "pages don't add up")
        refuse((last < 1).any() or (last > page).any(), "1 <= last_page_len <= page_size")
        refuse(heads % kv_heads or dim not in HEAD_DIMS, "no kernel for such heads")
        types = (options["q_data_type"], options["kv_data_type"] or options["q_data_type"])
        refuse(types[0] not in F16 or types[1] is not types[0], "no kernel for such dtypes")
        arrays = {"indptr": indptr, "indices": indices, "last": last, "starts": starts}
        if self._fixed is not None:
            refuse(len(last) != len(self._fixed["last"]), "The batch size should be fixed in cudagraph mode")
            refuse(len(indices) > len(self._fixed["indices"]), "The size of indices should be at most the buffer's")
            for name, buffer in self._fixed.items():
                buffer[: len(arrays[name])].copy_(arrays[name])
        self._arrays = self._fixed or {name: array.to(self.device, copy=True) for name, array in arrays.items()}
        self._rows, self._sizes, self._dtype = int(starts[-1]), sizes, types[0]
        scale = dim**-0.5 if options["sm_scale"] is None else options["sm_scale"]
        self._options = (scale, options["window_left"], options["logits_soft_cap"] or 0.0, options["causal"])
        self._plan_info = [len(last), self._fixed is not None]

    def run(self, q: Tensor, paged_kv_cache: Tensor, *args: Any, k_scale: Any = None, v_scale: Any = None) -> Tensor:
        refuse(self._plan_info is None, "plan info is not initialized")
        heads, kv_heads, dim, page = self._sizes
        refuse({q.dtype, paged_kv_cache.dtype} != {self._dtype}, "dtypes differ from those in the plan function")
        refuse(paged_kv_cache.shape[1:] != (2, kv_heads, page, dim), "the cache's shape differs from the plan's")
        refuse(q.shape != (self._rows, heads, dim) or q.device != self.device, "q does not match qo_indptr[-1]")
        keys, values = paged_kv_cache.unbind(1)
        refuse(keys.stride() != values.stride() or keys.stride(3) != 1, "k/v strides must be identical")
        step = (self._arrays[name] for name in ("starts", "indptr", "indices", "last"))
        return paged_attention(q, keys, values, *step, self._options)
