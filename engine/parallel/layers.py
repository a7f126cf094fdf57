"""What a rank's part of the model computes together with the others' (Shoeybi et al., "Megatron-LM", 2019)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from engine.models.transformer import Embedding, Model, Product


class Collectives(Protocol):
    """What ranks compute together; each calls the same in the same order, with tensors of the same shapes."""

    @property
    def rank(self) -> int:
        """This process's number."""

    def total(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, the same bits on each."""

    def side_by_side(self, part: Tensor, columns: int) -> Tensor:
        """All ranks' columns [R, N] in their order, the first `columns` of them: [R, columns]."""


@dataclass(frozen=True, slots=True, eq=False)
class RowParallel:
    """A product whose inputs are split: each rank has a share of every sum."""

    part: Product
    ranks: Collectives

    def __call__(self, x: Tensor) -> Tensor:
        """Activations [T, K / ranks] -> [T, N]."""
        return self.ranks.total(self.part(x))

    @property
    def nbytes(self) -> int:
        """Bytes held here."""
        return self.part.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class VocabularyEmbedding:
    """A table whose rows are split."""

    part: Embedding
    first: int
    """The id of this rank's first row."""
    rows: int
    ranks: Collectives

    def __call__(self, ids: Tensor) -> Tensor:
        """int64 [T] -> activations [T, W]. Ids are within the vocabulary: whoever sends the step has looked."""
        local = ids - self.first
        elsewhere = (local < 0) | (local >= self.rows)
        found = self.part(local.masked_fill(elsewhere, 0))
        return self.ranks.total(found.masked_fill_(elsewhere[:, None], 0))

    @property
    def nbytes(self) -> int:
        """Bytes held here beside the LM head."""
        return self.part.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class VocabularyHead:
    """An LM head whose outputs are split, with some of padding behind the last."""

    part: Product
    vocabulary: int
    ranks: Collectives

    def __call__(self, x: Tensor) -> Tensor:
        """[R, W] -> [R, V]."""
        if not x.shape[0]:
            return torch.empty((0, self.vocabulary), dtype=torch.float32, device=x.device)
        return self.ranks.side_by_side(self.part(x), self.vocabulary)

    @property
    def nbytes(self) -> int:
        """Bytes held here."""
        return self.part.nbytes


def over_ranks(model: Model, ranks: Collectives, vocabulary: int) -> Model:
    """`model`, which was loaded from a `RankCheckpoint`, with what the ranks compute together. `vocabulary`: the
    whole's.
    """
    layers = [
        replace(layer, output=RowParallel(layer.output, ranks), down=RowParallel(layer.down, ranks))
        for layer in model.layers
    ]
    rows = model.config.vocab_size
    return replace(
        model,
        layers=layers,
        embedding=VocabularyEmbedding(model.embedding, ranks.rank * rows, rows, ranks),
        head=VocabularyHead(model.head, vocabulary, ranks),
    )
