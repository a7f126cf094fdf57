"""Runs one batch: copies, forward pass, logits of the rows that sample, drawing. Stateless about sequences."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from engine.batch import Batch, SampleSpec, Slice, StepOutput
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.models.fused import FusedModel
from engine.models.meta import ForwardMeta
from engine.models.skipping import KeptCache
from engine.models.transformer import Model
from engine.sampler import greedy_rows, sample
from kernels.blocks import copy_blocks
from tandem.errors import InternalError
from tandem.record import SamplingParams


class Runner:
    """A `StepRunner` on the CPU. Called from one thread."""

    def __init__(self, model: Model | FusedModel, kv_cache: KVCache | KeptCache, engine_config: EngineConfig) -> None:
        """All three belong together: see `engine.loading.load_engine`."""
        self.model = model
        self._kv = kv_cache
        self._block_size = engine_config.block_size
        self._threads = engine_config.threads
        self._bound = threading.local()

    def run(self, batch: Batch) -> StepOutput:
        """See `StepRunner.run`."""
        self._bind_thread()
        copy_blocks(self._kv.blocks, batch.copies)
        if not batch.slices:
            return StepOutput([])
        with torch.inference_mode():
            token_ids, meta = build_meta(batch.slices, self._block_size)
            rows = sampled_rows(batch.slices, meta)
            predictions = self.model.step(token_ids, meta, self._kv, rows, greedy_rows(batch))
        return sample(batch, predictions)

    def _bind_thread(self) -> None:
        """OpenMP counts threads per calling thread: what the loading thread set doesn't hold on the engine's."""
        if self._threads is not None and not hasattr(self._bound, "threads"):
            torch.set_num_threads(self._threads)
            self._bound.threads = self._threads

    def warm_up(self) -> None:
        """One prompt step and one decode step in block 0, before any request is there."""
        spec = SampleSpec(0, SamplingParams(temperature=0.0), 0)
        length = min(2, self._block_size)
        self.run(Batch([Slice("warm-up", [0] * length, 0, [0], [spec])]))
        self.run(Batch([Slice("warm-up", [0], 0, [0], [spec])]))


def build_meta(slices: Sequence[Slice], block_size: int) -> tuple[torch.Tensor, ForwardMeta]:
    """Token ids int64 [T] of all slices one after another, and where each row belongs.

    Raises InternalError for an empty slice or one that its block table doesn't cover.
    """
    count = len(slices)
    lengths = np.fromiter((len(part.token_ids) for part in slices), np.int64, count)
    starts = np.fromiter((part.start for part in slices), np.int64, count)
    ends = starts + lengths
    widths = [len(part.block_table) for part in slices]
    if lengths.min() < 1 or starts.min() < 0 or bool((ends > np.array(widths) * block_size).any()):
        raise InternalError("a slice is empty, or its block table does not cover it")
    tables = np.zeros((count, max(widths)), np.int32)
    for row, part in enumerate(slices):
        tables[row, : widths[row]] = part.block_table
    query_starts = np.zeros(count + 1, np.int32)
    np.cumsum(lengths, out=query_starts[1:])
    owner = np.repeat(np.arange(count), lengths)
    positions = np.arange(query_starts[-1], dtype=np.int64) - query_starts[owner] + starts[owner]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    ids = np.fromiter((token for part in slices for token in part.token_ids), np.int64, int(query_starts[-1]))
    meta = ForwardMeta(
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        block_tables=torch.from_numpy(tables),
        query_starts=torch.from_numpy(query_starts),
        context_lens=torch.from_numpy(ends.astype(np.int32)),
    )
    return torch.from_numpy(ids), meta


def sampled_rows(slices: Sequence[Slice], meta: ForwardMeta) -> torch.Tensor:
    """The rows whose logits are sampled, int64 [R]: of each slice that has samples the last, and one more a draft."""
    ends = meta.query_starts.tolist()
    rows: list[int] = []
    for number, part in enumerate(slices):
        rows.extend(range(ends[number + 1] - part.num_sampled_rows, ends[number + 1]))
    return torch.tensor(rows, dtype=torch.int64)
