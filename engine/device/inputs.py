"""What a step reads on the device: the arrays that are sent there, and how a step is computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.models.meta import ForwardMeta
from engine.placing import Placing
from kernels.backends import HostStep
from kernels.draw_settings import COLUMNS, settings_columns
from kernels.sampling import Draw

KNOWN: Final = -1
"""In `sources`: the row's token is the one that was sent."""


def step_arrays(placing: Placing, sources: npt.NDArray[np.int64] | None) -> dict[str, npt.NDArray[Any]]:
    """The arrays of any step. `sources` int64 [T]: which draw of the step before gave a row its token, or KNOWN."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "token_ids": placing.token_ids,
        "positions": placing.positions,
        "slots": placing.slots,
        "block_tables": placing.block_tables,
        "query_starts": placing.query_starts,
        "context_lens": placing.context_lens,
    }
    return arrays if sources is None else {**arrays, "sources": sources}


def padded_arrays(
    placing: Placing,
    draws: Sequence[Draw],
    sources: npt.NDArray[np.int64] | None,
    bucket: int,
    max_blocks: int,
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a decode step of `bucket` rows and their draws: behind the real rows come some that write nothing,
    see nothing and are drawn from greedily."""
    count = placing.num_rows
    arrays: dict[str, npt.NDArray[Any]] = {
        "token_ids": np.zeros(bucket, np.int64),
        "positions": np.zeros(bucket, np.int64),
        "slots": np.full(bucket, -1, np.int64),
        "block_tables": np.zeros((bucket, max_blocks), np.int32),
        "query_starts": np.arange(bucket + 1, dtype=np.int32),
        "context_lens": np.zeros(bucket, np.int32),
        "sources": np.full(bucket, KNOWN, np.int64),
    }
    for name in ("token_ids", "positions", "slots", "context_lens"):
        arrays[name][:count] = getattr(placing, name)
    width = min(max_blocks, placing.block_tables.shape[1])  # a table may have blocks in reserve
    arrays["block_tables"][:count, :width] = placing.block_tables[:, :width]
    if sources is not None:
        arrays["sources"][:count] = sources
    return {**arrays, **settings_columns(draws, bucket)}


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """Arrays that have been sent."""

    tensors: Mapping[str, Tensor]

    def meta(self, host: HostStep) -> ForwardMeta:
        """Where the rows belong."""
        sent = self.tensors
        return ForwardMeta(
            positions=sent["positions"],
            slots=sent["slots"],
            block_tables=sent["block_tables"],
            query_starts=sent["query_starts"],
            context_lens=sent["context_lens"],
            host=host,
        )

    def token_ids(self, last: Tensor) -> Tensor:
        """int64 [T]; `last` int32 [N] holds the tokens of the step before, which the host may not know yet."""
        sent, sources = self.tensors["token_ids"], self.tensors.get("sources")
        if sources is None:
            return sent
        return torch.where(sources == KNOWN, sent, last[sources.clamp(min=0)].to(torch.int64))

    def settings(self) -> dict[str, Tensor]:
        """Settings of the draws, for `Operations.sample`."""
        return {name: self.tensors[name] for name in COLUMNS}
