"""Steps over several ranks on GPUs, one each: as `engine.parallel.steps`, but launched ahead, and captured as graphs.

Rank 0 draws, and its tokens go to the others' GPUs, where the next step may want them. Sums over ranks are part of a
graph: all capture the same ones in the same order, at warm-up or when a step first needs one, and replay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.config import EngineConfig
from engine.device.decode_graphs import DecodeGraphs, Key
from engine.device.device import Device
from engine.device.steps import DeviceLaunched, DeviceSteps, Sources
from engine.kv_cache import DeviceKVCache
from engine.models.transformer import Model
from engine.parallel.group import Fail
from engine.parallel.step import Step, Way, decode, encode
from engine.placing import Longs, Placing
from kernels.backends import DrawResults
from kernels.sampling import Draw

_NONE: Final[Longs] = np.zeros(0, np.int64)


class StepRanks(Protocol):
    """What of `engine.parallel.group.Ranks` steps use."""

    @property
    def fail(self) -> Fail: ...
    def send(self, message: bytes) -> None: ...
    def receive(self) -> bytearray | None: ...
    def share(self, values: Tensor) -> None: ...
    def meet(self) -> None: ...
    def at_close(self, release: Callable[[], None]) -> None: ...


class RankDeviceSteps(DeviceSteps):
    """What rank 0's and the others' have in common."""

    def __init__(
        self,
        model: Model,
        kv_cache: DeviceKVCache,
        engine_config: EngineConfig,
        device: Device,
        ranks: StepRanks,
        vocabulary: int,
        *,
        mirrored: bool = False,
    ) -> None:
        """See `DeviceSteps`; `vocabulary` is the whole model's."""
        super().__init__(model, kv_cache, engine_config, device, mirrored=mirrored)
        self._ranks, self._vocabulary = ranks, vocabulary
        if self.graphs is not None:
            ranks.at_close(self.graphs.clear)


class LeadingDeviceSteps(RankDeviceSteps):
    """Rank 0's. What fails after the others have heard of a step ends the process."""

    _batch: Batch

    def warm_up(self) -> None:
        """Capture graphs, as all ranks do."""
        if self.graphs is not None:
            self._ranks.send(encode(Step(None, _NONE, [], way=Way.WARM_UP)))
        super().warm_up()

    def launch(self, batch: Batch) -> DeviceLaunched:
        """See `engine.runner.Steps`."""
        self._batch = batch
        if not batch.slices and (batch.copies or batch.arrived):
            self._ranks.send(encode(Step(None, _NONE, batch.copies, batch.arrived)))
        launched = super().launch(batch)
        # What prefill computed is there once every rank's part is.
        return replace(launched, meet=self._ranks.meet) if launched.outbound is not None else launched

    def _logits(self, placing: Placing, sources: Sources | None, rows: Sources) -> Tensor:
        self._send(placing, sources, rows, Way.EAGER)
        try:
            return super()._logits(placing, sources, rows)
        except Exception as error:
            self._ranks.fail(f"rank 0 failed in a step: {error}")

    def _replay(
        self, graphs: DecodeGraphs, key: Key, placing: Placing, draws: Sequence[Draw], sources: Sources | None
    ) -> Tensor:
        self._send(placing, sources, np.arange(placing.num_rows), Way.REPLAYED)
        try:
            return super()._replay(graphs, key, placing, draws, sources)
        except Exception as error:
            self._ranks.fail(f"rank 0 failed in a captured step: {error}")

    def _send(self, placing: Placing, sources: Sources | None, rows: Sources, way: Way) -> None:
        known = _NONE if sources is None else sources
        self._ranks.send(encode(Step(placing, rows, self._batch.copies, self._batch.arrived, known, way)))

    def _run(self, batch: Batch, placing: Placing, draws: list[Draw], sources: Sources | None) -> DrawResults:
        results = super()._run(batch, placing, draws, sources)
        if any(part.samples for part in batch.slices):
            self._ranks.share(self._last)
        return results


class FollowingDeviceSteps(RankDeviceSteps):
    """Another rank's."""

    draws = False

    def follow(self) -> None:
        """Compute what rank 0 sends, until that says that it is over."""
        with torch.inference_mode():
            while (message := self._ranks.receive()) is not None:
                try:
                    self._compute(decode(message))
                except Exception as error:
                    self._ranks.fail(f"a step failed on another rank than 0: {error}")

    def _compute(self, step: Step) -> None:
        """In the order of `DeviceSteps.launch`."""
        if step.way is Way.WARM_UP:
            self.warm_up()
        if step.arrived:
            self._arrive(step.arrived)
        self._model.backend.operations.copy_blocks(self._kv.blocks, step.copies)
        if step.placing is None:
            return
        sources = step.sources if len(step.sources) else None
        if step.way is Way.REPLAYED and self.graphs is not None:
            self._replay(self.graphs, self.graphs.key_of(step.placing), step.placing, [], sources)
        else:
            self._logits(step.placing, sources, step.rows)
        if len(step.rows):
            self._ranks.share(self._last)
        outbound = self._outbound(step.copies, step.placing)
        if outbound is not None and self._mirror is not None:
            self._mirror.finish(outbound)
            self._ranks.meet()
