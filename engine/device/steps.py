"""Steps on a GPU: arrays go there in one copy, tokens come back in one, and nothing between them waits.

A step is launched and, later, collected; launches follow one another on one stream, so a step may be launched before
the one before it is collected. Decode steps replay captured graphs where they can, everything else runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch import Batch, StepOutput
from engine.config import EngineConfig
from engine.device.decode_graphs import CaptureProgress, DecodeGraphs, Key, contexts_for
from engine.device.device import Device
from engine.device.inputs import KNOWN, StepInputs, step_arrays
from engine.device.mirror import HostMirror, Outbound
from engine.device.readback import Readback
from engine.device.staging import Staging
from engine.kv_cache import DeviceKVCache
from engine.models.transformer import Model
from engine.placing import Placing, place, rows_to_sample
from engine.sampler import assemble, draws_of
from kernels.backends import DrawResults, HostStep
from kernels.draw_settings import drawn_of, edits_logits, ids_fit
from kernels.sampling import BAD_ID, Draw, Drawn

Sources = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceLaunched:
    """A step on its way. `draws` are those that were launched: all but the ones that `bad` names."""

    batch: Batch
    draws: Sequence[Draw]
    bad: frozenset[int]
    results: Readback | None
    mirror: HostMirror | None = None
    outbound: Outbound | None = None
    meet: Callable[[], None] | None = None
    """Returns when what this step wrote is on the host in every rank; None: there is no other."""

    def collect(self) -> StepOutput:
        """See `engine.batch.Launched`."""
        if self.mirror is not None and self.outbound is not None:
            self.mirror.finish(self.outbound)
            if self.meet is not None:
                self.meet()
        drawn = iter(drawn_of(self.draws, *self.results.wait()) if self.results is not None else ())
        count = len(self.draws) + len(self.bad)
        return assemble(self.batch, [Drawn(BAD_ID) if i in self.bad else next(drawn) for i in range(count)])


class DeviceSteps:
    """Life cycle: built around a loaded model and its cache -> `warm_up` -> `launch`, in one thread."""

    overlaps = True
    draws: ClassVar[bool] = True
    """Whether captured steps draw from their logits."""

    def __init__(
        self,
        model: Model,
        kv_cache: DeviceKVCache,
        engine_config: EngineConfig,
        device: Device,
        progress: CaptureProgress | None = None,
        *,
        mirrored: bool = False,
    ) -> None:
        """`progress` is told of graphs that are captured at warm-up. `mirrored`: what steps write goes to the host."""
        self._model, self._kv, self._device = model, kv_cache, device
        self._block_size = engine_config.block_size
        self._max_context = engine_config.context_limit(model.config)
        self._contexts = contexts_for(self._max_context)
        self._staging, self._progress = Staging(device), progress
        self._vocabulary = model.config.vocab_size
        most = max(engine_config.max_sequences, engine_config.max_step_tokens)
        self._last = torch.zeros(most, dtype=torch.int32, device=device.torch)
        self._mirrors_out = mirrored
        self._mirror = HostMirror(kv_cache, device, kv_cache.blocks_view()) if mirrored else None
        self.graphs: DecodeGraphs | None = None
        """Captured decode steps; None: everything runs eagerly."""
        if engine_config.graphs and device.graphs is not None and model.backend.capturable:
            parts = (model, kv_cache, engine_config, device, self._staging, self._last)
            self.graphs = DecodeGraphs(*parts, draws=self.draws)

    def warm_up(self) -> None:
        """Capture graphs."""
        if self.graphs is not None:
            self.graphs.warm_up(self._progress)

    def launch(self, batch: Batch) -> DeviceLaunched:
        """See `engine.runner.Steps`."""
        if batch.arrived:
            self._arrive(batch.arrived)
        self._model.backend.operations.copy_blocks(self._kv.blocks, batch.copies)
        if not batch.slices:
            return DeviceLaunched(batch, [], frozenset(), None)
        placing = place(batch.slices, self._block_size)
        placing.check(self._vocabulary, self._kv.tensor.shape[0], self._max_context)
        asked = draws_of(batch)
        bad = frozenset(i for i, draw in enumerate(asked) if edits_logits(draw) and not ids_fit(draw, self._vocabulary))
        draws = [draw for i, draw in enumerate(asked) if i not in bad] if bad else asked
        results = self._run(batch, placing, draws, _sources(batch, placing))
        readback = Readback(self._device, results) if draws else None
        return DeviceLaunched(batch, draws, bad, readback, self._mirror, self._outbound(batch.copies, placing))

    def _outbound(self, copies: Sequence[tuple[int, int]], placing: Placing) -> Outbound | None:
        """What a prefill worker's step wrote, on its way to where transfers read it."""
        if self._mirror is None or not self._mirrors_out:
            return None
        written = np.concatenate([placing.slots // self._block_size, [target for _, target in copies]])
        return self._mirror.start(np.unique(written).astype(np.int64))

    def _arrive(self, blocks: Sequence[int]) -> None:
        if self._mirror is None:
            self._mirror = HostMirror(self._kv, self._device, self._kv.blocks_view())
        self._mirror.bring(blocks)

    def _run(self, batch: Batch, placing: Placing, draws: list[Draw], sources: Sources | None) -> DrawResults:
        key = self.graphs.key_for(placing, draws) if self.graphs is not None else None
        if key is not None and self.graphs is not None:
            values = self._replay(self.graphs, key, placing, draws, sources)
            return DrawResults(values, *self._no_alternatives(len(draws)))
        rows, draws = self._rows(batch, placing, draws)
        logits = self._logits(placing, sources, rows)
        if not draws:
            return DrawResults(torch.zeros((3, 0), dtype=torch.int32), *self._no_alternatives(0))
        results = self._model.backend.operations.draw(logits, draws)
        # No more than may be followed: of a step with drafts, which isn't, there may be more draws.
        count = min(len(draws), len(self._last))
        self._last[:count].copy_(results.values[0][:count])
        return results

    def _replay(
        self, graphs: DecodeGraphs, key: Key, placing: Placing, draws: Sequence[Draw], sources: Sources | None
    ) -> Tensor:
        """Launch a captured step: what its draws bring, as `DecodeGraphs.launch` says."""
        return graphs.launch(key, placing, draws, sources)

    def _logits(self, placing: Placing, sources: Sources | None, rows: Sources) -> Tensor:
        """Launch an eager step: logits of `rows` [R, V]."""
        arrays: dict[str, npt.NDArray[Any]] = {**step_arrays(placing, sources), "rows": rows}
        inputs = StepInputs(self._staging.put(arrays))
        longest = next(context for context in self._contexts if context >= int(placing.context_lens.max()))
        host = HostStep(placing.query_starts, placing.context_lens, placing.block_tables, longest)
        self._model.backend.attention.plan(host)
        ids, sampled = inputs.token_ids(self._last), inputs.tensors["rows"]
        return self._model.step(ids, inputs.meta(host), self._kv, sampled).logits

    def _rows(self, batch: Batch, placing: Placing, draws: list[Draw]) -> tuple[Sources, list[Draw]]:
        """Rows whose logits are wanted, int64 [R], and the draws from them: those that edit logits get their own."""
        rows = rows_to_sample(batch.slices, placing.query_starts)
        if len({draw.row for draw in draws}) == len(draws) or not any(edits_logits(draw) for draw in draws):
            return rows, draws
        own = rows[[draw.row for draw in draws]]
        return own, [Draw(place_, draw.spec) for place_, draw in enumerate(draws)]

    def _no_alternatives(self, count: int) -> tuple[Tensor, Tensor]:
        return torch.zeros((count, 0), dtype=torch.int32), torch.zeros((count, 0))


def _sources(batch: Batch, placing: Placing) -> Sources | None:
    """int64 [T]: where each row's token is among the step before's, or KNOWN; None when all are known."""
    if all(part.follows is None for part in batch.slices):
        return None
    sources = np.full(placing.num_rows, KNOWN, np.int64)
    follows = [KNOWN if part.follows is None else part.follows for part in batch.slices]
    sources[placing.query_starts[1:] - 1] = follows
    return sources
