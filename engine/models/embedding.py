"""Token embeddings, from their own table or from the packed LM head when the two are tied."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.coded import CodedLinear, coded_rows
from kernels.embedding import embedding
from kernels.linear import PackedLinear, weight_rows


@dataclass(frozen=True, slots=True)
class TableEmbedding:
    """A plain table [V, W], float32 or bfloat16."""

    table: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.table.nbytes

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows of the table: int64 [T] -> float32 [T, W]. Raises InternalError for an id outside the vocabulary."""
        return embedding(ids, self.table)


@dataclass(frozen=True, slots=True)
class TiedEmbedding:
    """The packed LM head read as a table: one copy of the weights serves both (saves 113 MB for SmolLM2 in float32)."""

    head: PackedLinear

    @property
    def nbytes(self) -> int:
        """Bytes held beside the LM head."""
        return 0

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows of the table: int64 [T] -> float32 [T, W]. Raises InternalError for an id outside the vocabulary."""
        return weight_rows(self.head, ids)


@dataclass(frozen=True, slots=True)
class CodedEmbedding:
    """A table that stays a file's codes, be it the LM head's or its own."""

    table: CodedLinear
    shared: bool
    """The LM head holds it."""

    @property
    def nbytes(self) -> int:
        """Bytes held beside the LM head."""
        return 0 if self.shared else self.table.nbytes

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows of the table: int64 [T] -> float32 [T, W]. Raises InternalError for an id outside the vocabulary."""
        return coded_rows(self.table, ids)
