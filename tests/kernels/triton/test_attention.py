"""Decode and prefill attention in Triton's interpreter, beside torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from kernels.kv_codes import quantize_rows
from kernels.triton.attention import attention_reference, paged_decode, paged_prefill
from tandem.errors import InternalError

HALF = torch.float16


@dataclass(frozen=True)
class Step:
    """One step over a paged cache: what both functions take."""

    q: torch.Tensor
    kv_layer: torch.Tensor
    kv_scales: torch.Tensor | None
    tables: torch.Tensor
    starts: torch.Tensor
    contexts: torch.Tensor

    def reference(self, window: int | None = None, cap: float | None = None) -> torch.Tensor:
        """The step by torch."""
        step = (self.q, self.kv_layer, self.tables, self.starts, self.contexts)
        return attention_reference(*step, self.q.shape[2] ** -0.5, window, cap, self.kv_scales)

    def decode(self, window: int | None = None, cap: float | None = None, split: int | None = None) -> torch.Tensor:
        """The step, of one query a sequence, by `paged_decode`."""
        return paged_decode(
            self.q,
            self.kv_layer,
            self.tables,
            self.contexts,
            self.q.shape[2] ** -0.5,
            max_context=int(self.contexts.max()),
            sliding_window=window,
            soft_cap=cap,
            kv_scales=self.kv_scales,
            split=split,
        ).float()

    def prefill(self, window: int | None = None, cap: float | None = None) -> torch.Tensor:
        """The step by `paged_prefill`."""
        step = (self.q, self.kv_layer, self.tables, self.starts, self.contexts)
        given = {"sliding_window": window, "soft_cap": cap, "kv_scales": self.kv_scales}
        return paged_prefill(*step, self.q.shape[2] ** -0.5, **given).float()  # type: ignore[arg-type]


def make_step(
    counts: list[int],
    contexts: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    block_size: int = 16,
    form: str = "half",
    dtype: torch.dtype = HALF,
) -> Step:
    """Random queries and keys; the blocks are shuffled over a cache of two layers, whose unused memory is NaN."""
    generator = torch.Generator().manual_seed(7)
    needed = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(needed) + 2, generator=generator).int()
    tables = torch.full((len(contexts), max(needed) + 1), 1 << 20, dtype=torch.int32)
    shape = (len(order), 2, 2, kv_heads, block_size, dim)
    cache, scales = quantized(torch.randn(shape, generator=generator), form, dtype)
    if form == "half":
        cache[:, 0] = torch.nan
    first = 0
    for s, blocks in enumerate(needed):
        tables[s, :blocks] = order[first : first + blocks]
        if form == "half" and contexts[s] % block_size:
            cache[order[first + blocks - 1], :, :, :, contexts[s] % block_size :] = torch.nan
        first += blocks
    q = torch.randn(sum(counts), heads, dim, generator=generator).to(dtype)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return Step(q, cache[:, 1], scales, tables, starts, torch.tensor(contexts).int())


def quantized(cache: torch.Tensor, form: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The cache [blocks, layers, 2, Hkv, block_size, D] in `form`, and the scales of layer 1."""
    if form == "half":
        return cache.to(dtype), None
    codes, scales = quantize_rows(cache, torch.float8_e4m3fn if form == "fp8" else torch.int8)
    return codes, scales[:, 1]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("split", [None, 64])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (50, None), (1, 3.0), (None, 3.0)])
def test_decode(split: int | None, window: int | None, cap: float | None) -> None:
    step = make_step([1, 1, 1], [1, 64, 201])
    close(step.decode(window, cap, split), step.reference(window, cap))


@pytest.mark.parametrize(("window", "cap"), [(None, None), (50, None), (1, 3.0), (None, 3.0)])
def test_prefill(window: int | None, cap: float | None) -> None:
    step = make_step([5, 0, 1, 12], [5, 30, 64, 141])
    close(step.prefill(window, cap), step.reference(window, cap))


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_quantised_caches(form: str) -> None:
    step = make_step([1, 1], [70, 130], form=form)
    close(step.decode(), step.reference())
    close(step.decode(split=64), step.reference())
    step = make_step([3, 9], [70, 130], form=form)
    close(step.prefill(), step.reference())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(9, 3, 64, 16), (7, 1, 80, 7), (2, 2, 8, 1), (20, 1, 128, 32), (2, 1, 256, 64)],
)
def test_geometries(heads: int, kv_heads: int, dim: int, block_size: int) -> None:
    step = make_step([1, 1], [3, 90], heads, kv_heads, dim, block_size)
    close(step.decode(split=64), step.reference())
    step = make_step([3, 8], [3, 90], heads, kv_heads, dim, block_size)
    close(step.prefill(), step.reference())


def test_float32() -> None:
    step = make_step([1, 1], [70, 130], dtype=torch.float32)
    torch.testing.assert_close(step.decode(split=64), step.reference(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.prefill(), step.reference(), rtol=1e-5, atol=1e-5)


def test_a_row_of_padding_gives_zeros() -> None:
    step = make_step([1, 1], [70, 130])
    step.contexts[0] = 0
    for split in (None, 64):
        out = step.decode(split=split)
        assert not out[0].any()
        close(out[1], step.reference()[1])


def test_a_decoded_row_has_the_same_bits_in_any_batch() -> None:
    step = make_step([1, 1, 1], [70, 201, 130])
    alone = Step(step.q[:1], step.kv_layer, None, step.tables[:1], step.starts[:2], step.contexts[:1])
    given = {"scale": 0.2, "max_context": 201, "split": 64}
    whole = paged_decode(step.q, step.kv_layer, step.tables, step.contexts, **given)  # type: ignore[arg-type]
    single = paged_decode(alone.q, alone.kv_layer, alone.tables, alone.contexts, **given)  # type: ignore[arg-type]
    assert torch.equal(whole[:1], single)


def test_wrong_arguments_are_named() -> None:
    step = make_step([1], [20])
    with pytest.raises(InternalError, match="kv_layer must be"):
        paged_decode(step.q.float(), step.kv_layer, step.tables, step.contexts, 1.0, max_context=20)
    with pytest.raises(InternalError, match="with kv_scales just when"):
        paged_decode(step.q, step.kv_layer.to(torch.int8), step.tables, step.contexts, 1.0, max_context=20)
    with pytest.raises(InternalError, match="context_lens must be"):
        paged_decode(step.q, step.kv_layer, step.tables, step.contexts.long(), 1.0, max_context=20)
    with pytest.raises(InternalError, match="sliding_window 0"):
        paged_prefill(step.q, step.kv_layer, step.tables, step.starts, step.contexts, 1.0, sliding_window=0)
