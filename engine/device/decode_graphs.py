"""Decode steps captured as graphs: model, sampling, and the tokens kept where the next step finds them.

One graph a bucket of rows and class of contexts. A step takes the smallest that holds it; the rest is padding. The
class bounds the grid of attention and the block tables that are sent. Drafts are rows like others: a captured step has
sequences of one row each, some of which may have the same blocks. Life of a graph: captured at warm-up, the largest
first (they share one memory pool), or later when a step first needs it -> replayed -> dropped, when more than `limit`
are held and it was used least recently.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.device.device import Device
from engine.device.graphs import Graph
from engine.device.inputs import StepInputs, padded_arrays
from engine.device.staging import Layout, Staging
from engine.kv_cache import DeviceKVCache
from engine.models.transformer import Model
from engine.placing import Placing
from kernels.backends import HostStep
from kernels.draw_settings import edits_logits
from kernels.sampling import Draw

logger = logging.getLogger("engine")
MAX_GRAPHS: Final = 64
SHORT_CONTEXT: Final = 2048
SMALL: Final = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)

CaptureProgress = Callable[[int, int], None]
"""Called with (graphs captured, graphs in all)."""


def buckets_for(max_sequences: int) -> list[int]:
    """Rows of the graphs that are captured: steps of a third at most up to 64, then every 32; the last holds all."""
    larger = range(96, max_sequences + 1, 32)
    return sorted({bucket for bucket in (*SMALL, *larger) if bucket < max_sequences} | {max_sequences})


def contexts_for(max_context: int) -> list[int]:
    """Most tokens of a context for each class: four times the last, and the longest."""
    classes = [SHORT_CONTEXT]
    while classes[-1] < max_context:
        classes.append(4 * classes[-1])
    return [*classes[:-1], max_context]


class Key(NamedTuple):
    """Of a graph."""

    context: int
    rows: int


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    graph: Graph
    layout: Layout
    inputs: Tensor
    """uint8 [layout.nbytes]: what each step's arrays are copied to."""
    values: Tensor
    """int32 [3, bucket]: what each replay draws."""


class DecodeGraphs:
    """One engine's graphs; used by one thread at a time."""

    def __init__(
        self,
        model: Model,
        kv_cache: DeviceKVCache,
        engine_config: EngineConfig,
        device: Device,
        staging: Staging,
        last: Tensor,
        limit: int = MAX_GRAPHS,
        *,
        draws: bool = True,
    ) -> None:
        """`last` int32 [at least max_sequences] holds the tokens drawn last. `device.graphs` is there.

        Without `draws` steps end with their logits: another rank draws.
        """
        assert device.graphs is not None
        self._backend = device.graphs
        self._model, self._kv, self._device, self._staging = model, kv_cache, device, staging
        self._last, self._limit, self._draws = last, limit, draws
        self._block_size = engine_config.block_size
        self._contexts = contexts_for(engine_config.context_limit(model.config))
        self._buckets = buckets_for(engine_config.max_sequences)
        self._captured: OrderedDict[Key, _Captured] = OrderedDict()

    def __len__(self) -> int:
        """Graphs held."""
        return len(self._captured)

    def clear(self) -> None:
        """Let go of all graphs, once none runs."""
        self._device.fence().wait()
        self._captured.clear()

    def warm_up(self, progress: CaptureProgress | None = None) -> None:
        """Capture as many as are held, those of short contexts before others, the largest first."""
        keys = [Key(context, rows) for context in self._contexts for rows in self._buckets[::-1]]
        wanted = sorted(keys[: self._limit], reverse=True)
        for count, key in enumerate(wanted, 1):
            self._get(key)
            logger.info(
                "decode graph captured, %d of %d: %d rows, %d tokens", count, len(wanted), key.rows, key.context
            )
            if progress is not None:
                progress(count, len(wanted))
        held = self._backend.held_bytes()
        logger.info("captured %d decode graphs, which hold %.0f MiB", len(self._captured), held / (1 << 20))

    def key_for(self, placing: Placing, draws: Sequence[Draw]) -> Key | None:
        """The graph of a step, or None when it must run eagerly: a row of it isn't drawn from once (it prefills), its
        draws need more than settings, or it has more rows than any graph."""
        count = placing.num_rows
        if len(draws) != count or count > self._buckets[-1]:
            return None
        if not all(draw.row == row and _is_plain(draw) for row, draw in enumerate(draws)):
            return None
        return self.key_of(placing)

    def key_of(self, placing: Placing) -> Key:
        """The smallest graph that holds a step's rows and contexts: there is one."""
        longest = int(placing.context_lens.max())
        context = next(context for context in self._contexts if context >= longest)
        return Key(context, next(rows for rows in self._buckets if rows >= placing.num_rows))

    def launch(
        self, key: Key, placing: Placing, draws: Sequence[Draw], sources: npt.NDArray[np.int64] | None
    ) -> Tensor:
        """Replay the step; its draws' values int32 [3, len(draws)], valid until the next launch of this graph."""
        arrays = padded_arrays(placing.row_by_row(), draws, sources, key.rows, self._width(key))
        captured = self._get(key)
        self._model.backend.attention.plan(_host(arrays, key))
        self._staging.send(arrays, captured.layout, captured.inputs)
        captured.graph.replay()
        return captured.values[:, : len(draws)]

    def _width(self, key: Key) -> int:
        """Blocks of the longest table."""
        return -(-key.context // self._block_size)

    def _get(self, key: Key) -> _Captured:
        captured = self._captured.pop(key, None) or self._capture(key)
        self._captured[key] = captured
        while len(self._captured) > self._limit:
            self._captured.popitem(last=False)
        return captured

    def _capture(self, key: Key) -> _Captured:
        """A graph over a step of nothing but padding: what it reads then is what a warm run may see."""
        longs, ints = np.zeros(0, np.int64), np.zeros(0, np.int32)
        empty = Placing(longs, longs, longs, np.zeros((0, 0), np.int32), ints, ints)
        arrays = padded_arrays(empty, [], None, key.rows, self._width(key))
        layout = Layout.of(arrays)
        memory = torch.zeros(layout.nbytes, dtype=torch.uint8, device=self._device.torch)
        self._staging.send(arrays, layout, memory)
        values = torch.zeros((3, key.rows), dtype=torch.int32, device=self._device.torch)
        inputs, host = StepInputs(layout.views(memory)), _host(arrays, key)
        meta = inputs.meta(host)
        operations = self._model.backend.operations

        def step() -> None:
            logits = self._model.step(inputs.token_ids(self._last), meta, self._kv, None).logits
            if self._draws:
                values.copy_(operations.sample(logits, inputs.settings()))
                self._last[: key.rows].copy_(values[0])

        self._model.backend.attention.plan(host)
        return _Captured(self._backend.capture(step), layout, memory, values)


def _host(arrays: dict[str, npt.NDArray[Any]], key: Key) -> HostStep:
    lengths = (arrays["query_starts"], arrays["context_lens"], arrays["block_tables"])
    return HostStep(*lengths, max_context=key.context, bucket=key.rows)


def _is_plain(draw: Draw) -> bool:
    return not draw.spec.logprobs and not edits_logits(draw)
