"""Inputs of the GPU checks: paged steps, weights and draws on a device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv_codes import quantize_rows
from kernels.sampling import Draw
from kernels.triton.attention import attention_reference, paged_decode, paged_prefill
from tandem.record import SamplingParams

KV_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class Step:
    """One step over a paged cache."""

    q: Tensor
    kv_layer: Tensor
    kv_scales: Tensor | None
    tables: Tensor
    starts: Tensor
    contexts: Tensor
    longest: int
    window: int | None = None
    cap: float | None = None

    @property
    def scale(self) -> float:
        """Of the products."""
        return 1.0 / math.sqrt(self.q.shape[2])

    def decode(self) -> Tensor:
        """By `paged_decode`."""
        step = (self.q, self.kv_layer, self.tables, self.contexts, self.scale)
        return paged_decode(
            *step, max_context=self.longest, sliding_window=self.window, soft_cap=self.cap, kv_scales=self.kv_scales
        )

    def prefill(self) -> Tensor:
        """By `paged_prefill`."""
        step = (self.q, self.kv_layer, self.tables, self.starts, self.contexts, self.scale)
        return paged_prefill(*step, sliding_window=self.window, soft_cap=self.cap, kv_scales=self.kv_scales)

    def expected(self) -> Tensor:
        """By torch."""
        step = (self.q, self.kv_layer, self.tables, self.starts, self.contexts, self.scale)
        return attention_reference(*step, self.window, self.cap, self.kv_scales)

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values that the sequences have."""
        one = 2 * self.kv_layer.shape[2] * self.kv_layer.shape[4] * self.kv_layer.element_size()
        return int(self.contexts.sum()) * one


def make_step(
    counts: list[int],
    contexts: list[int],
    dtype: torch.dtype,
    device: str,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    form: str = "half",
    window: int | None = None,
    cap: float | None = None,
    block_size: int = 16,
) -> Step:
    """A step of sequences with counts[i] queries each, contexts[i] positions long; blocks are shuffled."""
    torch.manual_seed(0)
    needed = [-(-context // block_size) for context in contexts]
    blocks = sum(needed)
    order = torch.randperm(blocks).int()
    tables = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
    first = 0
    for row, count in enumerate(needed):
        tables[row, :count] = order[first : first + count]
        first += count
    values = torch.randn(blocks, 2, kv_heads, block_size, dim, device=device, dtype=dtype)
    kv, scales = _quantized(values, form)
    q = torch.randn(sum(counts), heads, dim, device=device, dtype=dtype)
    starts = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    return Step(q, kv, scales, tables.to(device), starts, lengths, max(contexts), window, cap)


def _quantized(values: Tensor, form: str) -> tuple[Tensor, Tensor | None]:
    return (values, None) if form == "half" else quantize_rows(values.float(), KV_DTYPES[form])


@dataclass(frozen=True)
class Spec:
    """A draw's specification, as the engine's."""

    params: SamplingParams
    index: int = 0
    position: int = 0
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    logprobs: int | None = None


def make_draws(count: int, params: SamplingParams) -> list[Draw]:
    """One draw a row, each with noise of its own."""
    return [Draw(row, Spec(params, index=row, position=row * 17)) for row in range(count)]
