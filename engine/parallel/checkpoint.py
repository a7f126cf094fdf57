"""A checkpoint as one rank sees it: loaders read their part of each tensor as if it were all there is.

A tensor of plain numbers is read where its part lies; of one that is a file's codes the whole is unpacked, one tensor
at a time, and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.parallel.codes import columns_of, rows_of
from engine.parallel.sharding import rank_config, split_of
from engine.weights.checkpoint import Checkpoint, StoredTensor
from kernels.coded import CodedWeights
from kernels.int8 import GroupWeights
from tandem.errors import ConfigError


class RankCheckpoint:
    """A `Checkpoint` over another, which stays its opener's to close."""

    def __init__(self, whole: Checkpoint, rank: int, size: int) -> None:
        """Raises ConfigError for a number of ranks that the model doesn't divide by."""
        self._whole, self._rank, self._size = whole, rank, size
        self._config = rank_config(whole.config, size)

    @property
    def config(self) -> ModelConfig:
        """The rank's: its heads, its inner columns, its rows of the vocabulary."""
        return self._config

    @property
    def files(self) -> Sequence[Path]:
        """The whole's."""
        return self._whole.files

    @property
    def coding(self) -> str:
        """The whole's."""
        return self._whole.coding

    @property
    def kv_scales(self) -> str:
        """The whole's."""
        return self._whole.kv_scales

    def names(self) -> Sequence[str]:
        """The whole's."""
        return self._whole.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The part's; the whole's where that can't be split, so that loaders refuse it."""
        shape, split = self._whole.shape(name), split_of(name)
        if split == "vocabulary" and shape[0] == self._whole.config.vocab_size:
            return self._config.vocab_size, *shape[1:]
        axis = {"rows": 0, "columns": 1}.get(split)
        if axis is None or axis >= len(shape) or shape[axis] % self._size:
            return shape
        return *shape[:axis], shape[axis] // self._size, *shape[axis + 1 :]

    def tensor(self, name: str) -> Tensor:
        """The part, perhaps a view."""
        whole, split = self._whole.tensor(name), split_of(name)
        if split == "columns":
            return whole[:, self._span(whole.shape[1])]
        if split == "rows":
            return whole[self._span(whole.shape[0])]
        if split == "vocabulary":
            held = whole[self._vocabulary()]
            missing = self._config.vocab_size - held.shape[0]
            return torch.cat([held, held.new_zeros(missing, held.shape[1])]) if missing else held
        return torch.zeros_like(whole) if split == "first" and self._rank else whole

    def coded(self, name: str) -> CodedWeights | None:
        """The part of the codes. Raises ConfigError for codes that can't be split."""
        whole, split = self._whole.coded(name), split_of(name)
        if whole is None or split == "whole":
            return whole
        if split == "vocabulary":
            return rows_of(whole, self._vocabulary(), self._config.vocab_size)
        if split == "rows":
            span = self._span(whole.codes.shape[0])
            return rows_of(whole, span, span.stop - span.start)
        if (part := columns_of(whole, self._span(whole.codes.shape[1]))) is None:
            raise ConfigError(
                f"{self._whole.files[0]}: {name} ({self._whole.config.quantization}) rounds what it multiplies by the "
                "largest of a whole row, and no rank has one: this model runs with WORLD_SIZE 1 only"
            )
        return part

    def codes(self, name: str) -> GroupWeights | None:
        """None: what takes such codes isn't split."""
        return None

    def release(self, name: str) -> None:
        """Give the source pages of the whole back."""
        self._whole.release(name)

    def stored(self) -> Iterator[StoredTensor]:
        """The whole's: a model's identity is every rank's."""
        return self._whole.stored()

    def close(self) -> None:
        """Nothing: the whole is its opener's."""

    def _span(self, length: int) -> slice:
        part = length // self._size
        return slice(self._rank * part, (self._rank + 1) * part)

    def _vocabulary(self) -> slice:
        part, rows = self._config.vocab_size, self._whole.config.vocab_size
        return slice(min(self._rank * part, rows), min((self._rank + 1) * part, rows))
