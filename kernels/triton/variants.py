"""What is compiled ahead of time: each kernel as a large model's layers launch it, on tensors that hold nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.triton.activation import gated_launch
from kernels.triton.blocks import move_launch
from kernels.triton.decode_attention import decode_launches
from kernels.triton.dequantize import dequantize_launch
from kernels.triton.draw import draw_launch, top_launch
from kernels.triton.embedding import embedding_launch
from kernels.triton.group_linear import GroupQuantized, group_launches
from kernels.triton.kv_format import kv_format
from kernels.triton.launch import Launch
from kernels.triton.logit_edits import Edits, edit_launch
from kernels.triton.norm import norm_launch
from kernels.triton.prefill_attention import prefill_launch
from kernels.triton.quantize import quantize_launch
from kernels.triton.rope import rope_launch
from kernels.triton.scaled_linear import scaled_launches

DTYPE = torch.bfloat16
KV_DTYPES = {"half": DTYPE, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
HEADS, KV_HEADS, BLOCK_SIZE = 32, 8, 16
HIDDEN, MLP, VOCABULARY = 4096, 14336, 128256
SEQUENCES, TOKENS, CONTEXT = 64, 2048, 8192


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(form: str, dim: int, tokens: int) -> dict[str, Any]:
    """What both attentions take, but for their own."""
    kv_layer = empty(4096, 32, 2, KV_HEADS, BLOCK_SIZE, dim, dtype=KV_DTYPES[form])[:, 1]
    scales = empty(4096, 32, 2, KV_HEADS, BLOCK_SIZE, dtype=torch.float32)[:, 1]
    return {
        "q": empty(tokens, HEADS, dim),
        "kv_layer": kv_layer,
        "block_tables": empty(SEQUENCES, CONTEXT // BLOCK_SIZE, dtype=torch.int32),
        "context_lens": empty(SEQUENCES, dtype=torch.int32),
        "out": empty(tokens, HEADS, dim),
        "scale": 0.1,
        "kv_scales": None if form == "half" else scales,
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


def norm(width: int, heads: int = 1, residual: bool = False) -> list[Launch]:
    """RMSNorm of rows, or of heads."""
    x = empty(TOKENS, heads, width)
    return [norm_launch(x, empty(width), x, 1e-5, x[:, 0] if residual else None)]


def rope(form: str, dim: int, interleaved: bool = False) -> list[Launch]:
    """Rotation and the write of keys and values."""
    given = _attention(form, dim, TOKENS)
    angles, index = empty(CONTEXT, dim // 2, dtype=torch.float32), empty(TOKENS, dtype=torch.int64)
    qkv, cache = empty(TOKENS, (HEADS + 2 * KV_HEADS) * dim), given["kv_layer"]
    step = (qkv, index, index, angles, angles, cache, given["out"])
    return [rope_launch(*step, interleaved, given["kv_scales"], given["form"])]


def gated(kind: str) -> list[Launch]:
    """A gated activation."""
    return [gated_launch(empty(TOKENS, 2 * MLP), empty(TOKENS, MLP), kind)]


def embedding() -> list[Launch]:
    """A look-up of token ids."""
    ids = empty(TOKENS, dtype=torch.int64)
    return [embedding_launch(ids, empty(VOCABULARY, HIDDEN), empty(TOKENS, HIDDEN), 0)]


def sampling(dtype: torch.dtype) -> list[Launch]:
    """Edits of logits, a draw of each row, and the likeliest tokens."""
    logits = empty(SEQUENCES, VOCABULARY, dtype=dtype)
    ints, keys = empty(SEQUENCES, dtype=torch.int32), empty(SEQUENCES, dtype=torch.int64)
    reals, floats = empty(SEQUENCES, dtype=torch.float64), empty(SEQUENCES, dtype=torch.float32)
    ids, values = empty(SEQUENCES, 5, dtype=torch.int32), empty(SEQUENCES, 5, dtype=torch.float32)
    return [
        edit_launch(logits, Edits(keys, reals, reals, reals, ints)),
        draw_launch(logits, ints, reals, ints, reals, reals, keys, ints, floats, floats),
        top_launch(logits, ints, floats, ids, values),
    ]


def blocks(indexed: str) -> list[Launch]:
    """Blocks of all layers, copied, gathered or scattered."""
    cache, ids = empty(4096, 32, 2, KV_HEADS, BLOCK_SIZE, 128), empty(256, dtype=torch.int64)
    packed = empty(256, 32, 2, KV_HEADS, BLOCK_SIZE, 128)
    return {
        "copy": [move_launch(cache, cache, ids, ids, 256)],
        "gather": [move_launch(cache, packed, ids, None, 256)],
        "scatter": [move_launch(packed, cache, None, ids, 256)],
    }[indexed]


def scaled(dtype: torch.dtype, rows: int, blocks: bool = False) -> list[Launch]:
    """A product of 8-bit codes, scales by token and channel or by blocks."""
    x, w, out = empty(rows, HIDDEN, dtype=dtype), empty(MLP, HIDDEN, dtype=dtype), empty(rows, MLP)
    x_scales = empty(rows, HIDDEN // 128, dtype=torch.float32) if blocks else empty(rows, dtype=torch.float32)
    w_scales = empty(MLP // 128, HIDDEN // 128, dtype=torch.float32) if blocks else empty(MLP, dtype=torch.float32)
    return scaled_launches(x, w, x_scales, w_scales, None, out)


def grouped(bits: int, group: int, rows: int, minima: bool = False) -> list[Launch]:
    """A product with weights of 4 or 8 bits."""
    table = empty(MLP, HIDDEN // group, dtype=torch.float16)
    codes = empty(MLP, HIDDEN * bits // 8, dtype=torch.uint8)
    weight = GroupQuantized(bits, group, codes, table, table if minima else None)
    return group_launches(empty(rows, HIDDEN), weight, None, empty(rows, MLP))


def dequantized(bits: int, group: int) -> list[Launch]:
    """A weight written out in 16 bits."""
    codes, table = empty(MLP, HIDDEN * bits // 8, dtype=torch.uint8), empty(MLP, HIDDEN // group, dtype=torch.float16)
    return [dequantize_launch(codes, table, None, bits, group, empty(MLP, HIDDEN))]


def quantized(dtype: torch.dtype, group: int) -> list[Launch]:
    """Activations quantised, a scale a group."""
    scales = empty(TOKENS, HIDDEN // group, dtype=torch.float32)
    return [quantize_launch(empty(TOKENS, HIDDEN), empty(TOKENS, HIDDEN, dtype=dtype), scales, group, False)]


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
    "rope and KV write, D 128": lambda: rope("half", 128),
    "rope and KV write, D 64, interleaved": lambda: rope("half", 64, True),
    "rope and KV write, D 128, KV fp8": lambda: rope("fp8", 128),
    "rope and KV write, D 128, KV int8": lambda: rope("int8", 128),
    "RMSNorm, width 4096": lambda: norm(HIDDEN),
    "RMSNorm with residual, width 4096": lambda: norm(HIDDEN, residual=True),
    "RMSNorm with residual, width 16384": lambda: norm(16384, residual=True),
    "RMSNorm of heads, D 128": lambda: norm(128, HEADS),
    "SiLU and product": lambda: gated("silu"),
    "GeLU and product": lambda: gated("gelu"),
    "GeLU by tanh and product": lambda: gated("gelu_tanh"),
    "embedding": embedding,
    "quantise to fp8, a scale a row": lambda: quantized(torch.float8_e4m3fn, HIDDEN),
    "quantise to fp8, groups of 128": lambda: quantized(torch.float8_e4m3fn, 128),
    "quantise to int8, a scale a row": lambda: quantized(torch.int8, HIDDEN),
    "product int8, 16 rows": lambda: scaled(torch.int8, 16),
    "product int8, 2048 rows": lambda: scaled(torch.int8, TOKENS),
    "product fp8, 16 rows": lambda: scaled(torch.float8_e4m3fn, 16),
    "product fp8, 2048 rows": lambda: scaled(torch.float8_e4m3fn, TOKENS),
    "product fp8 in blocks, 16 rows": lambda: scaled(torch.float8_e4m3fn, 16, True),
    "product fp8 in blocks, 2048 rows": lambda: scaled(torch.float8_e4m3fn, TOKENS, True),
    "product 4-bit weights, groups of 128, 16 rows": lambda: grouped(4, 128, 16),
    "product 4-bit weights, groups of 32, minima, 16 rows": lambda: grouped(4, 32, 16, True),
    "product 4-bit weights, groups of 128, 64 rows": lambda: grouped(4, 128, 64),
    "product 8-bit weights, groups of 128, 16 rows": lambda: grouped(8, 128, 16),
    "product 8-bit weights, groups of 32, 64 rows": lambda: grouped(8, 32, 64),
    "4-bit weights written out, groups of 128": lambda: dequantized(4, 128),
    "8-bit weights written out, groups of 32": lambda: dequantized(8, 32),
    "blocks copied": lambda: blocks("copy"),
    "blocks gathered": lambda: blocks("gather"),
    "blocks scattered": lambda: blocks("scatter"),
    "sampling, float32 logits": lambda: sampling(torch.float32),
    "sampling, bfloat16 logits": lambda: sampling(torch.bfloat16),
}
