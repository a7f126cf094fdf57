"""What is compiled ahead of time: each kernel as a large model's layers launch it, on tensors that hold nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.triton.decode_attention import decode_launches
from kernels.triton.kv_format import kv_format
from kernels.triton.launch import Launch
from kernels.triton.prefill_attention import prefill_launch

DTYPE = torch.bfloat16
KV_DTYPES = {"half": DTYPE, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
HEADS, KV_HEADS, BLOCK_SIZE = 32, 8, 16
SEQUENCES, TOKENS, CONTEXT = 64, 2048, 8192


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(form: str, dim: int, tokens: int) -> dict[str, Any]:
    """What both attentions take, but for their own."""
    kv_layer = empty(4096, 32, 2, KV_HEADS, BLOCK_SIZE, dim, dtype=KV_DTYPES[form])[:, 1]
    scales = {
        "half": None,
        "fp8": empty(2, KV_HEADS, dtype=torch.float32),
        "int8": empty(4096, 32, 2, KV_HEADS, BLOCK_SIZE, dtype=torch.float32)[:, 1],
    }[form]
    return {
        "q": empty(tokens, HEADS, dim),
        "kv_layer": kv_layer,
        "block_tables": empty(SEQUENCES, CONTEXT // BLOCK_SIZE, dtype=torch.int32),
        "context_lens": empty(SEQUENCES, dtype=torch.int32),
        "out": empty(tokens, HEADS, dim),
        "scale": 0.1,
        "kv_scales": scales,
        "form": kv_format(kv_layer),
    }


def decode(form: str, dim: int, window: int | None = None, cap: float | None = None) -> list[Launch]:
    """Decode attention in splits, and their reduction."""
    given = _attention(form, dim, SEQUENCES)
    return decode_launches(**given, max_context=CONTEXT, sliding_window=window, soft_cap=cap)


def prefill(form: str, dim: int, window: int | None = None, cap: float | None = None) -> list[Launch]:
    """Prefill attention over chunks."""
    starts = empty(SEQUENCES + 1, dtype=torch.int32)
    given = _attention(form, dim, TOKENS)
    return [prefill_launch(**given, query_starts=starts, sliding_window=window, soft_cap=cap)]


VARIANTS: dict[str, Callable[[], list[Launch]]] = {
    "decode attention, D 64": lambda: decode("half", 64),
    "decode attention, D 128": lambda: decode("half", 128),
    "decode attention, D 256, window, soft cap": lambda: decode("half", 256, 4096, 50.0),
    "decode attention, D 128, KV fp8": lambda: decode("fp8", 128),
    "decode attention, D 128, KV int8": lambda: decode("int8", 128),
    "prefill attention, D 64": lambda: prefill("half", 64),
    "prefill attention, D 128": lambda: prefill("half", 128),
    "prefill attention, D 256, window, soft cap": lambda: prefill("half", 256, 4096, 50.0),
    "prefill attention, D 128, KV fp8": lambda: prefill("fp8", 128),
    "prefill attention, D 128, KV int8": lambda: prefill("int8", 128),
}
