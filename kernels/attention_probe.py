"""Whether an attention computes what torch does: a small step, by the very calls that the engine makes.

Attention of other packages is tried so before it is taken. The cache is a layer out of several, as the engine's is, and
contexts are longer than a window where that is short, so that its edge is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kernels.backends import Attention, AttentionShape, HostStep
from kernels.torch_operations import TorchAttention

TOLERANCE: Final = 2e-2
"""Of the largest magnitude: what rounding to 16 bits may change, and no wrong position stays under."""
LONGEST: Final = 8192
"""Windows beyond are not looked over the edge of."""
LAYERS: Final = 3


@dataclass(frozen=True, slots=True, eq=False)
class ProbeStep:
    """One step, as `kernels.backends.AttentionMeta` on the device and with the host's half of it."""

    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    host: HostStep


def disagreement(attention: Attention, shape: AttentionShape, device: torch.device) -> str | None:
    """What an attention does wrong, for people; None when it agrees with torch. Raises whatever the attention does."""
    windows = tuple(dict.fromkeys(shape.windows)) or (None,)
    contexts = _contexts(shape, windows)
    blocks = sum(_blocks(shape, contexts))
    cache = _random((blocks, LAYERS, 2, shape.kv_heads, shape.block_size, shape.head_dim), device).to(shape.kv_dtype)
    for kind, queries, bucket in _kinds(attention, contexts):
        step = probe_step(shape, queries, contexts, bucket, device)
        q = _random((sum(queries), shape.heads, shape.head_dim), device).to(shape.dtype)
        attention.plan(step.host)
        for window in windows:
            with torch.inference_mode():
                run = (q, cache[:, 1], step, shape.scale, window)
                actual, expected = attention.run(*run), TorchAttention(shape, device).run(*run)
            error = float((actual - expected).abs().max() / expected.abs().max())
            if not error <= TOLERANCE:  # NaN is none
                return f"{kind} with a window of {window} is off by {error:.3g} of the largest element"
    return None


def _kinds(attention: Attention, contexts: list[int]) -> list[tuple[str, list[int], int | None]]:
    """(name, queries of each sequence, bucket) of each kind of step."""
    one, chunks = [1] * len(contexts), [min(7, context) for context in contexts]
    kinds: list[tuple[str, list[int], int | None]] = [("decode", one, None), ("prefill", chunks, None)]
    return [*kinds, ("decode for graphs", one, len(one))] if attention.capturable else kinds


def _contexts(shape: AttentionShape, windows: tuple[int | None, ...]) -> list[int]:
    """Of at most three sequences: one past every window's edge, one of whole blocks, one short."""
    past = max((window + 9 for window in windows if window is not None and window <= LONGEST), default=0)
    wanted = (max(3 * shape.block_size + 5, past), 2 * shape.block_size, 5)
    return [min(length, shape.max_context) for length in wanted[: shape.max_sequences]]


def _blocks(shape: AttentionShape, contexts: list[int]) -> list[int]:
    return [-(-context // shape.block_size) for context in contexts]


def probe_step(
    shape: AttentionShape, queries: list[int], contexts: list[int], bucket: int | None, device: torch.device
) -> ProbeStep:
    """A step of sequences with queries[s] rows each, contexts[s] positions long; blocks are shuffled."""
    counts = _blocks(shape, contexts)
    tables = np.zeros((len(contexts), max(1, *counts)), np.int32)
    numbers = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum([0, *counts]), counts, strict=False)):
        tables[row, :count] = numbers[first : first + count]
    starts, lengths = np.cumsum([0, *queries]).astype(np.int32), np.array(contexts, np.int32)
    sent = [torch.from_numpy(array).to(device) for array in (tables, starts, lengths)]
    return ProbeStep(sent[0], sent[1], sent[2], HostStep(starts, lengths, tables, max(contexts), bucket))


def _random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(device)
