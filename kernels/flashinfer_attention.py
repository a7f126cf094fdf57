"""`kernels.backends.Attention` by FlashInfer: its wrappers for paged decode and paged prefill.

Source: FlashInfer (Ye et al., 2025), flashinfer/decode.py and flashinfer/prefill.py. Its layout "HND" is a layer of our
cache as it lies, [blocks, 2, kv_heads, block_size, head_dim] with a stride between blocks: nothing is copied. What it
can't take `unfit` says: codes of 8 bits with a scale a position, float32, other widths of heads.

A wrapper shares out a step's work on the host (`plan`) and computes each layer by that (`run`). The window of a layer
is part of a plan, so there is a wrapper for each window, for prefill and decode, and once more for each bucket of
captured steps: these read lengths and block numbers from memory that stays in its place.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from kernels.backends import AttentionMeta, AttentionShape, HostStep
from kernels.packages import Package
from kernels.paged_plan import Pages
from tandem.errors import InternalError

PACKAGE: Final = Package("flashinfer", "flashinfer-python", "0.6.1", "0.8")
HEAD_DIMS: Final = (64, 128, 256)
DTYPES: Final = (torch.float16, torch.bfloat16)
WORKSPACE_BYTES: Final = 384 << 20
"""For what splits of long contexts give before they are summed: one for all wrappers, as steps follow one another."""
TENSOR_CORE_GROUP: Final = 4
"""Query heads a KV head from which decoding by tensor cores is the faster way; the other takes groups of 1, 2, 3."""


def unfit(shape: AttentionShape, device: torch.device) -> str | None:
    """Why FlashInfer can't compute the attention of such a model; None when it can."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "it is for NVIDIA GPUs"
    if shape.dtype not in DTYPES or shape.kv_dtype is not shape.dtype:
        return f"it takes float16 or bfloat16 throughout, not {shape.dtype} with keys and values of {shape.kv_dtype}"
    if shape.head_dim not in HEAD_DIMS:
        return f"it takes heads of {', '.join(map(str, HEAD_DIMS))} elements, not {shape.head_dim}"
    return None


@dataclass(slots=True, eq=False)
class _Wrapper:
    """One of FlashInfer's. Life cycle: built -> `plan` before a step -> `run` for each layer -> `plan` ... ."""

    wrapper: Any
    captured: bool
    _sent: Any = None
    _layout: list[int] = field(default_factory=list)

    def plan(self, device: torch.device, *args: Any, **kwargs: Any) -> None:
        """Raises InternalError when a captured step can't be replayed by the new plan."""
        if self._sent is not None:
            # A plan goes to the device from pinned memory of the wrapper's own, which must have been read by now.
            self._sent.synchronize()
        self.wrapper.plan(*args, **kwargs)
        if device.type == "cuda":
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()
        if self.captured:
            self._check_layout()

    def _check_layout(self) -> None:
        """A graph holds the offsets and the grid of the plan it was captured with."""
        layout = [int(number) for number in getattr(self.wrapper, "_plan_info", None) or ()]
        if self._layout and layout != self._layout:
            raise InternalError(f"FlashInfer planned {layout} for a step that was captured as {self._layout}")
        self._layout = layout


class FlashInferAttention:
    """See the module's text. Raises whatever FlashInfer does when it can't be used here."""

    name = "flashinfer"
    capturable = True

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        """Takes the workspace; `unfit` has had nothing to say of `shape`."""
        self._api: Any = importlib.import_module("flashinfer")
        self._shape, self._device = shape, device
        self._windows = tuple(dict.fromkeys(shape.windows)) or (None,)
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._indices: Tensor | None = None
        self._wrappers: dict[tuple[bool, int | None], dict[int | None, _Wrapper]] = {}
        self._planned: dict[int | None, _Wrapper] = {}

    @property
    def numerics(self) -> str:
        """With FlashInfer's version."""
        return f"{self.name}-{PACKAGE.version}"

    def plan(self, step: HostStep) -> None:
        """See `kernels.backends.Attention`. Waits for nothing but the last plan's way to the device."""
        pages, key = Pages.of(step, self._shape.block_size, self._device), (step.one_each, step.bucket)
        with torch.inference_mode():  # as steps are: what is made in it is written to in it alone
            if key not in self._wrappers:
                self._wrappers[key] = self._make(*key)
            self._planned = self._wrappers[key]
            for window, wrapper in self._planned.items():
                self._plan(wrapper, pages, window, step.one_each)

    def run(
        self,
        q: Tensor,
        kv_layer: Tensor,
        meta: AttentionMeta,
        scale: float,
        window: int | None,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """See `kernels.backends.Attention`. Raises InternalError for what was not planned."""
        if window not in self._planned:
            raise InternalError(f"no attention with a window of {window} was planned; planned: {list(self._planned)}")
        if scale != self._shape.scale or kv_scales is not None:
            raise InternalError(f"planned without scales of keys and values, and with {self._shape.scale}, not {scale}")
        out: Tensor = self._planned[window].wrapper.run(q, kv_layer)
        return out

    def _plan(self, wrapper: _Wrapper, pages: Pages, window: int | None, decode: bool) -> None:
        shape = self._shape
        kwargs: dict[str, Any] = {
            "window_left": -1 if window is None else window - 1,  # FlashInfer's doesn't count the position itself
            "logits_soft_cap": shape.soft_cap,
            "sm_scale": shape.scale,
            "q_data_type": shape.dtype,
            "kv_data_type": shape.kv_dtype,
        }
        sizes = (shape.heads, shape.kv_heads, shape.head_dim, shape.block_size)
        lengths = (pages.starts, pages.indices, pages.last_lens)
        if decode:
            wrapper.plan(self._device, *lengths, *sizes, **kwargs)
        else:
            wrapper.plan(self._device, pages.query_starts, *lengths, *sizes, causal=True, **kwargs)

    def _make(self, decode: bool, bucket: int | None) -> dict[int | None, _Wrapper]:
        """A wrapper for each window; captured ones share their memory."""
        if not decode:
            return {window: _Wrapper(self._prefill(), captured=False) for window in self._windows}
        buffers = {} if bucket is None else self._buffers(bucket)
        return {window: _Wrapper(self._decode(buffers), captured=bool(buffers)) for window in self._windows}

    def _prefill(self) -> Any:
        return self._api.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")

    def _decode(self, buffers: dict[str, Tensor]) -> Any:
        tensor_cores = self._shape.heads // self._shape.kv_heads >= TENSOR_CORE_GROUP
        return self._api.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "HND", use_cuda_graph=bool(buffers), use_tensor_cores=tensor_cores, **buffers
        )

    def _buffers(self, bucket: int) -> dict[str, Tensor]:
        """Where plans of `bucket` sequences are copied to. All buckets share the block numbers: a step runs alone."""
        if self._indices is None:
            widest = -(-self._shape.max_context // self._shape.block_size)
            self._indices = self._zeros(self._shape.max_sequences * widest)
        return {
            "paged_kv_indptr_buffer": self._zeros(bucket + 1),
            "paged_kv_indices_buffer": self._indices,
            "paged_kv_last_page_len_buffer": self._zeros(bucket),
        }

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self._device)
