"""Runs an EAGLE head as if it were a model: a `StepRunner` over tokens that are one place ahead of their features.

Slot j of a sequence holds the row at position `origin` + j of its output: the token behind that position with the
target's features at it, or, where a draft is the token, with what the head gave for the row before.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.batch import Batch, SampleSpec, Slice, StepOutput
from engine.features import FeatureStore
from engine.models.eagle import EagleHead
from engine.models.meta import ForwardMeta, Predictions
from engine.runner import build_meta, sampled_rows
from engine.sampler import sample
from tandem.errors import InternalError
from tandem.record import SamplingParams

Key = tuple[str, int | None]


class EagleRunner:
    """A `StepRunner`; stateful, unlike others: it remembers where each output's rows begin, and its last result."""

    def __init__(self, head: EagleHead, features: FeatureStore, num_blocks: int, block_size: int) -> None:
        """Takes `num_blocks` KV blocks of memory of its own, when they are first written."""
        config = head.config
        self._head, self._features, self._block_size = head, features, block_size
        self._kv = torch.empty(num_blocks, 2, config.num_kv_heads, block_size, config.head_dim)
        self._origins: dict[Key, int] = {}
        self._last: dict[Key, Tensor] = {}

    def place(self, request: str, output: int, origin: int) -> None:
        """An output's rows begin at position `origin`."""
        self._origins[request, output] = origin

    def forget(self, request: str, output: int) -> None:
        """The output has left. Unknown ones are ignored."""
        self._origins.pop((request, output), None)
        self._last.pop((request, output), None)
        self._features.drop(request, output)

    def run(self, batch: Batch) -> StepOutput:
        """See `StepRunner.run`. Outputs were placed; a slice's rows have features, or it is one row behind them."""
        if batch.copies:
            raise InternalError("the KV of an EAGLE head is never shared")
        with torch.inference_mode():
            token_ids, meta = build_meta(batch.slices, self._block_size)
            hidden = torch.cat([self._hidden(part) for part in batch.slices])
            result = self._head.forward(token_ids, hidden, self._placed(batch, meta), self._kv)
            rows = sampled_rows(batch.slices, meta)
            self._remember(batch, result[rows])
            predictions = Predictions(self._head.logits(result[rows]))
        return sample(batch, predictions)

    def warm_up(self) -> None:
        """One row in block 0, before any request is there."""
        self.place("warm-up", 0, 0)
        self._last["warm-up", 0] = torch.zeros(1, self._head.config.hidden_size)
        spec = SampleSpec(0, SamplingParams(temperature=0.0), 0)
        self.run(Batch([Slice("warm-up", [0], 0, [0], [spec], output=0)]))
        self.forget("warm-up", 0)

    def _hidden(self, part: Slice) -> Tensor:
        """What stands beside the tokens of a slice: float32 [tokens, W]."""
        assert part.output is not None, "drafts are made for one output"
        first = self._origins[part.request_id, part.output] + part.start
        if first >= self._features.end(part.request_id, part.output):
            return self._last[part.request_id, part.output]
        rows = self._features.rows(part.request_id, part.output, first, first + len(part.token_ids))
        return self._head.fused(rows)

    def _placed(self, batch: Batch, meta: ForwardMeta) -> ForwardMeta:
        """Positions counted from the start of the output's text."""
        origins = torch.tensor([self._origins[part.request_id, part.output] for part in batch.slices])
        lengths = torch.tensor([len(part.token_ids) for part in batch.slices])
        return replace(meta, positions=meta.positions + origins.repeat_interleave(lengths))

    def _remember(self, batch: Batch, rows: Tensor) -> None:
        """The result behind the last token of each slice that draws: the next row's features."""
        sampled = [part for part in batch.slices if part.samples]
        for number, part in enumerate(sampled):
            self._last[part.request_id, part.output] = rows[number : number + 1].clone()
