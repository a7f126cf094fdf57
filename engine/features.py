"""Hidden states of recent tokens, kept for EAGLE heads.

Life cycle of an output's features: `saw` after each step of the target (rows of a prompt belong to all outputs until
each has a chain of its own) -> `trim` before the head reads, which forgets rows of drafts that weren't kept -> `rows`
-> `drop`. At most `limit` rows an output are kept, the latest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import Slice
from engine.models.meta import Taps

LIMIT = 128
"""Rows kept of one output."""


class _Rows:
    """Consecutive rows: positions `base` to `end` of one output, the latest `limit` of them."""

    def __init__(self, limit: int, width: int) -> None:
        self.base = self.end = 0
        self._limit, self._at = limit, 0
        self._memory = torch.empty(2 * limit, width)

    def put(self, position: int, rows: Tensor) -> None:
        """Rows from `position` on take the place of what is there; what was before a gap is forgotten."""
        if not self.base <= position <= self.end:
            self.base = self.end = position
            self._at = 0
        if len(rows) > self._limit:
            position, rows = position + len(rows) - self._limit, rows[-self._limit :]
            self.base, self._at = position, 0
        start = self._at + position - self.base
        if start + len(rows) > len(self._memory):
            count = min(self._limit, position - self.base)
            self._memory[:count] = self._memory[start - count : start].clone()
            self.base, self._at, start = position - count, 0, count
        self._memory[start : start + len(rows)] = rows
        self.end = position + len(rows)
        surplus = max(0, self.end - self.base - self._limit)
        self.base, self._at = self.base + surplus, self._at + surplus

    def trim(self, end: int) -> None:
        """Forget rows from position `end` on."""
        if end < self.base:
            self.base, self._at = end, 0
        self.end = min(self.end, end)

    def rows(self, start: int, end: int) -> Tensor:
        """A view of positions start .. end-1, which are there."""
        at = self._at - self.base
        return self._memory[at + start : at + end]

    def copy(self) -> _Rows:
        """The same in memory of its own."""
        other = _Rows(self._limit, self._memory.shape[1])
        other.put(self.base, self.rows(self.base, self.end))
        return other


class FeatureStore:
    """The features of all outputs aboard. One thread uses it."""

    def __init__(self, layers: tuple[int, ...], limit: int = LIMIT) -> None:
        """`layers` as in `Taps`."""
        self._layers, self._limit = layers, limit
        self._rows: dict[tuple[str, int | None], _Rows] = {}

    def taps(self) -> Taps:
        """For the next step of the target."""
        return Taps(self._layers)

    def saw(self, slices: Sequence[Slice], taps: Taps) -> None:
        """The step is over; `taps` has a row for each token of `slices`."""
        features = taps.kept[0] if len(taps.kept) == 1 else torch.cat(taps.kept, dim=1)
        start = 0
        for part in slices:
            piece = features[start : start + len(part.token_ids)]
            start += len(piece)
            outputs: set[int | None] = (
                {part.output} if part.output is not None else {spec.index for spec in part.samples} or {None}
            )
            for output in outputs:
                self._of(part.request_id, output, piece.shape[1]).put(part.start, piece)
            if outputs != {None}:
                self._rows.pop((part.request_id, None), None)

    def trim(self, request: str, output: int, end: int) -> tuple[int, int]:
        """Only rows below position `end` count. The positions that are there, as (first, behind the last)."""
        rows = self._rows.get((request, output))
        if rows is None:
            return end, end
        rows.trim(end)
        return rows.base, rows.end

    def rows(self, request: str, output: int, start: int, end: int) -> Tensor:
        """Features float32 [end - start, F] of positions that `trim` says are there; a view, valid until `saw`."""
        return self._rows[request, output].rows(start, end)

    def end(self, request: str, output: int) -> int:
        """Behind the last position that is there; 0 when there is none."""
        rows = self._rows.get((request, output))
        return rows.end if rows is not None else 0

    def drop(self, request: str, output: int) -> None:
        """Forget an output. Unknown ones are ignored."""
        self._rows.pop((request, output), None)
        self._rows.pop((request, None), None)

    def _of(self, request: str, output: int | None, width: int) -> _Rows:
        if (rows := self._rows.get((request, output))) is None:
            prompt = self._rows.get((request, None))
            rows = self._rows[request, output] = _Rows(self._limit, width) if prompt is None else prompt.copy()
        return rows
