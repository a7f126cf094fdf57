"""Runs one batch: copies, forward pass, logits of the rows that sample, drawing. Stateless about sequences."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from engine.batch import Batch, Launched, SampleSpec, Slice, StepOutput
from engine.config import EngineConfig
from engine.features import FeatureStore
from engine.kv_cache import DeviceKVCache, KVCache
from engine.models.fused import FusedModel
from engine.models.meta import ForwardMeta, Predictions
from engine.models.skipping import KeptCache
from engine.models.transformer import Model
from engine.placing import Placing, place, rows_to_sample
from engine.sampler import greedy_rows, sample
from kernels.blocks import copy_blocks
from tandem.errors import ConfigError, InternalError
from tandem.record import SamplingParams


class Steps(Protocol):
    """How one device computes steps. One engine's, called from one thread."""

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched before the last one is collected, and follow its draws."""

    def launch(self, batch: Batch) -> Launched:
        """Copies, rows, draws. Raises InternalError for a batch that breaks its contract."""

    def warm_up(self) -> None:
        """What a device wants beside the first steps."""


class Runner:
    """A `StepRunner`, the same on every device. Called from one thread."""

    def __init__(
        self,
        model: Model | FusedModel,
        kv_cache: KVCache | DeviceKVCache | KeptCache,
        engine_config: EngineConfig,
        steps: Steps | None = None,
    ) -> None:
        """All four belong together: see `engine.loading.load_engine`. `steps` None: those of the CPU."""
        self.model = model
        self._steps = steps or HostSteps(model, kv_cache, engine_config)
        self._block_size = engine_config.block_size
        self._threads = engine_config.threads
        self._bound = threading.local()

    def run(self, batch: Batch) -> StepOutput:
        """See `StepRunner.run`."""
        return self.launch(batch).collect()

    def launch(self, batch: Batch) -> Launched:
        """`run` in two halves: on a GPU the step runs on while the caller does something else."""
        self._bind_thread()
        with torch.inference_mode():
            return self._steps.launch(batch)

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched before the last one is collected (`Slice.follows`)."""
        return self._steps.overlaps

    def keep_features(self, features: FeatureStore) -> None:
        """Hidden states of what is run are kept from now on. Raises ConfigError where steps don't show them."""
        if not isinstance(self._steps, HostSteps) or not isinstance(self.model, Model):
            raise ConfigError("hidden states are kept on the CPU with --compute exact or bf16 only")
        self._steps.features = features

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
        with torch.inference_mode():
            self._steps.warm_up()


class Done:
    """A step that was over when its launch returned."""

    def __init__(self, output: StepOutput) -> None:
        """`output` is what it brought."""
        self._output = output

    def collect(self) -> StepOutput:
        """See `Launched`."""
        return self._output


class HostSteps:
    """Steps on the CPU: a launch computes all of it."""

    overlaps = False

    def __init__(
        self, model: Model | FusedModel, kv_cache: KVCache | DeviceKVCache | KeptCache, config: EngineConfig
    ) -> None:
        """See `Runner`."""
        self._model, self._kv, self._block_size = model, kv_cache, config.block_size
        self.features: FeatureStore | None = None

    def warm_up(self) -> None:
        """Nothing to do."""

    def launch(self, batch: Batch) -> Launched:
        """See `Steps`."""
        copy_blocks(self._kv.blocks, batch.copies)
        if not batch.slices:
            return Done(StepOutput([]))
        if any(part.follows is not None for part in batch.slices):
            raise InternalError("a step on the CPU follows nothing: it is over when it was launched")
        token_ids, meta = build_meta(batch.slices, self._block_size)
        rows = sampled_rows(batch.slices, meta)
        return Done(sample(batch, self._step(batch, token_ids, meta, rows)))

    def _step(self, batch: Batch, token_ids: torch.Tensor, meta: ForwardMeta, rows: torch.Tensor) -> Predictions:
        if self.features is None or not isinstance(self._model, Model):
            return self._model.step(token_ids, meta, self._kv, rows, greedy_rows(batch))
        taps = self.features.taps()
        predictions = self._model.step(token_ids, meta, self._kv, rows, taps=taps)
        self.features.saw(batch.slices, taps)
        return predictions


def build_meta(slices: Sequence[Slice], block_size: int) -> tuple[torch.Tensor, ForwardMeta]:
    """Token ids int64 [T] of all slices one after another, and where each row belongs.

    Raises InternalError for an empty slice or one that its block table doesn't cover.
    """
    return inputs_of(place(slices, block_size))


def inputs_of(placing: Placing) -> tuple[torch.Tensor, ForwardMeta]:
    """The same of rows that are placed."""
    meta = ForwardMeta(
        positions=torch.from_numpy(placing.positions),
        slots=torch.from_numpy(placing.slots),
        block_tables=torch.from_numpy(placing.block_tables),
        query_starts=torch.from_numpy(placing.query_starts),
        context_lens=torch.from_numpy(placing.context_lens),
    )
    return torch.from_numpy(placing.token_ids), meta


def sampled_rows(slices: Sequence[Slice], meta: ForwardMeta) -> torch.Tensor:
    """The rows whose logits are sampled, int64 [R]: see `engine.placing.rows_to_sample`."""
    return torch.from_numpy(rows_to_sample(slices, meta.query_starts.numpy()))
