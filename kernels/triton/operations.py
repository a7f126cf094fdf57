"""`kernels.backends.Operations` and `Attention` by the Triton kernels of this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
from torch import Tensor

from kernels.backends import AttentionMeta, AttentionShape, DrawResults, HostStep
from kernels.kv_codes import FixedScales
from kernels.sampling import Draw
from kernels.triton.activation import gated
from kernels.triton.attention import paged_decode, paged_prefill
from kernels.triton.blocks import copy_blocks
from kernels.triton.embedding import embedding
from kernels.triton.launch import target
from kernels.triton.norm import rms_norm, rms_norm_heads
from kernels.triton.rope import rope_and_store
from kernels.triton.sampling import Settings, sample, start_draws
from tandem.errors import InternalError


class TritonOperations:
    """See `kernels.backends.Operations`; what is no more than a kernel's function is that function."""

    name = "triton"
    capturable = True

    @property
    def numerics(self) -> str:
        """The compiler's version and the chip."""
        return f"triton-{triton.__version__}-{target().backend}{target().arch or ''}"

    embedding = staticmethod(embedding)
    rms_norm = staticmethod(rms_norm)
    rms_norm_heads = staticmethod(rms_norm_heads)

    def rope_and_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_layer: Tensor,
        num_heads: int,
        num_kv_heads: int,
        *,
        interleaved: bool = False,
        kv_scales: Tensor | None = None,
        fixed_scales: FixedScales | None = None,
    ) -> Tensor:
        """See `kernels.triton.rope`; the KV heads are those of the cache."""
        step = (qkv, positions, slots, cos, sin, kv_layer)
        return rope_and_store(*step, num_heads, interleaved=interleaved, kv_scales=kv_scales, fixed_scales=fixed_scales)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `kernels.triton.activation`."""
        return gated(gate_up, "silu")

    def copy_blocks(self, cache: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """One after the other, as the CPU's: pairs that depend on earlier ones wait for another launch."""
        for group in independent(pairs):
            copy_blocks(cache, group)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> DrawResults:
        """See `kernels.triton.sampling.start_draws`."""
        started = start_draws(logits, draws)
        return DrawResults(started.sampled.values, started.top_ids, started.top_logprobs)

    def sample(self, logits: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        """See `kernels.triton.sampling.sample`."""
        return sample(logits, Settings(**settings)).values


def independent(pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """`pairs` in order, cut where a pair names a target, or writes a source, of the group before it."""
    groups: list[list[tuple[int, int]]] = []
    written: set[int] = set()
    read: set[int] = set()
    for source, target_block in pairs:
        if not groups or source in written or target_block in written | read:
            groups.append([])
            written, read = set(), set()
        groups[-1].append((source, target_block))
        written.add(target_block)
        read.add(source)
    return groups


class TritonAttention:
    """Split-KV decode for steps of one row a sequence, chunked prefill for the others. Nothing is planned."""

    name = numerics = "triton"
    capturable = True

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        """Any shape that the kernels take."""
        self._soft_cap = shape.soft_cap

    def plan(self, step: HostStep) -> None:
        """Nothing to do."""

    def run(
        self,
        q: Tensor,
        kv_layer: Tensor,
        meta: AttentionMeta,
        scale: float,
        window: int | None,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """See `kernels.triton.attention`. Raises InternalError when `meta.host` is missing."""
        step = (q, kv_layer, meta.block_tables)
        if meta.host is None:
            raise InternalError("attention on a GPU needs the step's lengths on the host")
        cap, longest = self._soft_cap, meta.host.max_context
        if meta.host.one_each:
            decoding = (*step, meta.context_lens, scale)
            return paged_decode(
                *decoding, max_context=longest, sliding_window=window, soft_cap=cap, kv_scales=kv_scales
            )
        chunks = (*step, meta.query_starts, meta.context_lens, scale)
        return paged_prefill(*chunks, sliding_window=window, soft_cap=cap, kv_scales=kv_scales)
