"""The transformer of `engine.models.transformer` as one fused call a step, with int8 products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models.meta import NOT_PICKED, ForwardMeta, Predictions
from kernels.step import Step, StepShape


class KvTensor(Protocol):
    """The paged cache, as far as the fused step reads it."""

    tensor: Tensor
    """[blocks, layers, 2, Hkv, block_size, D]."""
    scales: Tensor | None
    """Of codes: [blocks, layers, 2, Hkv, block_size]."""
    order: str
    """See `kernels.kv_order`."""


def step_shape(config: ModelConfig) -> StepShape:
    """What the fused step must know of a model."""
    return StepShape(
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
        eps=config.rms_eps,
        interleaved_rope=config.rope.interleaved,
    )


@dataclass(frozen=True, slots=True, eq=False)
class FusedModel:
    """A loaded model; immutable, holds no state of any sequence."""

    config: ModelConfig
    kernel: Step
    nbytes: int
    """Bytes of all weights; tied ones count once."""
    step_nbytes: int
    """Bytes of those that every step reads in full: all but the tables of rotations and of untied embeddings."""

    def step(
        self,
        token_ids: Tensor,
        meta: ForwardMeta,
        kv_cache: KvTensor,
        rows: Tensor | None,
        greedy: Tensor | None = None,
    ) -> Predictions:
        """See `engine.models.transformer.Model.step`."""
        if rows is None:
            rows = torch.arange(token_ids.shape[0])
        best = None if greedy is None else torch.full((len(rows),), NOT_PICKED, dtype=torch.int64)
        logits = self.kernel.run(
            token_ids,
            meta.positions,
            meta.slots,
            meta.block_tables,
            meta.query_starts,
            meta.context_lens,
            kv_cache.tensor,
            rows,
            kv_cache.order,
            greedy,
            best,
            kv_cache.scales,
        )
        return Predictions(logits, best)
