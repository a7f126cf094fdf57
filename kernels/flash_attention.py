"""`kernels.backends.Attention` by FlashAttention 3 and 2.

Source: FlashAttention (Dao et al., 2022; Shah et al., 2024), hopper/flash_attn_interface.py and
flash_attn/flash_attn_interface.py. Both read keys and values [blocks, block_size, kv_heads, head_dim] by strides of
which the last alone must be 1: a layer of our cache with two dimensions exchanged, so nothing is copied. A row of
padding (no context) gives zeros.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from kernels.backends import AttentionMeta, AttentionShape, HostStep
from kernels.packages import Package
from kernels.paged_plan import send
from tandem.errors import InternalError

PACKAGE_3: Final = Package("flash_attn_interface", "flash-attn-3", "3.0", "4")
PACKAGE_2: Final = Package("flash_attn", "flash-attn", "2.6", "3")
PAGE_MULTIPLE: Final = 256
"""Of version 2: positions of a block."""
MAX_HEAD_DIM: Final = 256
DTYPES: Final = (torch.float16, torch.bfloat16)


def unfit_3(shape: AttentionShape, device: torch.device) -> str | None:
    """Why FlashAttention 3 can't compute the attention of such a model there; None when it can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        return "it is for Hopper GPUs"
    return _unfit(shape, device)


def unfit_2(shape: AttentionShape, device: torch.device) -> str | None:
    """Why FlashAttention 2 can't compute the attention of such a model there; None when it can."""
    if shape.block_size % PAGE_MULTIPLE:
        return f"it takes KV blocks of {PAGE_MULTIPLE} tokens (--block-size), not of {shape.block_size}"
    return _unfit(shape, device)


def _unfit(shape: AttentionShape, device: torch.device) -> str | None:
    if device.type == "cuda" and torch.version.hip is not None:
        return "it is used on NVIDIA GPUs only"
    if shape.dtype not in DTYPES or shape.kv_dtype is not shape.dtype:
        return f"it takes float16 or bfloat16 throughout, not {shape.dtype} with keys and values of {shape.kv_dtype}"
    if shape.head_dim % 8 or shape.head_dim > MAX_HEAD_DIM:
        return f"it takes heads of a multiple of 8 elements, at most {MAX_HEAD_DIM}, not {shape.head_dim}"
    return None


class _FlashAttention(ABC):
    """What both versions have in common."""

    name: ClassVar[str]
    package: ClassVar[Package]
    capturable = True

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        """Imports the package; `unfit_...` has had nothing to say of `shape`."""
        self._api: Any = importlib.import_module(self.package.module)
        self._shape, self._device = shape, device
        self._longest_query = 1

    @property
    def numerics(self) -> str:
        """With the package's version."""
        return f"{self.name}-{self.package.version}"

    def plan(self, step: HostStep) -> None:
        """See `kernels.backends.Attention`: grids of prefill steps follow the longest chunk."""
        self._longest_query = int(np.diff(step.query_starts).max())

    def run(
        self,
        q: Tensor,
        kv_layer: Tensor,
        meta: AttentionMeta,
        scale: float,
        window: int | None,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """See `kernels.backends.Attention`. Raises InternalError for what can't be computed."""
        if kv_scales is not None or meta.host is None:
            raise InternalError("FlashAttention needs the step's lengths on the host, and takes no scales")
        keys, values = kv_layer.transpose(2, 3).unbind(1)
        options: dict[str, Any] = {
            "softmax_scale": scale,
            "causal": True,
            "window_size": (-1, -1) if window is None else (window - 1, 0),  # positions before the query's own
            "softcap": self._shape.soft_cap or 0.0,
        }
        if meta.host.one_each:
            return self._decode(q[:, None], keys, values, meta, options)[:, 0]
        return self._prefill(q, keys, values, meta, options)

    @abstractmethod
    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, meta: AttentionMeta, options: dict[str, Any]) -> Tensor:
        """q [S, 1, Hq, D] -> [S, 1, Hq, D]."""

    @abstractmethod
    def _prefill(self, q: Tensor, keys: Tensor, values: Tensor, meta: AttentionMeta, options: dict[str, Any]) -> Tensor:
        """q [T, Hq, D] -> [T, Hq, D]."""


class FlashAttention3(_FlashAttention):
    """One function for prefill and decode, blocks of any size."""

    name = "flash-attn-3"
    package = PACKAGE_3

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, meta: AttentionMeta, options: dict[str, Any]) -> Tensor:
        cache = {"cache_seqlens": meta.context_lens, "page_table": meta.block_tables}
        out: Tensor = self._api.flash_attn_with_kvcache(q, keys, values, **cache, **options)
        return out

    def _prefill(self, q: Tensor, keys: Tensor, values: Tensor, meta: AttentionMeta, options: dict[str, Any]) -> Tensor:
        chunks = {"cu_seqlens_q": meta.query_starts, "max_seqlen_q": self._longest_query}
        return self._decode(q, keys, values, meta, {**chunks, **options})


class FlashAttention2(_FlashAttention):
    """Blocks of a multiple of 256 positions; prefill asks for the sums of contexts."""

    name = "flash-attn-2"
    package = PACKAGE_2

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        """See `_FlashAttention`."""
        super().__init__(shape, device)
        self._context_starts: Tensor | None = None
        self._longest_context = 1

    def plan(self, step: HostStep) -> None:
        """See `kernels.backends.Attention`."""
        super().plan(step)
        if not step.one_each:
            sums = np.concatenate([[0], np.cumsum(step.context_lens)]).astype(np.int32)
            self._context_starts = send(sums, self._device)
            self._longest_context = int(step.context_lens.max())

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, meta: AttentionMeta, options: dict[str, Any]) -> Tensor:
        cache = {"cache_seqlens": meta.context_lens, "block_table": meta.block_tables}
        out: Tensor = self._api.flash_attn_with_kvcache(q, keys, values, **cache, **options)
        return out

    def _prefill(self, q: Tensor, keys: Tensor, values: Tensor, meta: AttentionMeta, options: dict[str, Any]) -> Tensor:
        if self._context_starts is None:
            raise InternalError("this step was not planned")
        lengths = (meta.query_starts, self._context_starts, self._longest_query, self._longest_context)
        out: Tensor = self._api.flash_attn_varlen_func(
            q, keys, values, *lengths, block_table=meta.block_tables, **options
        )
        return out
