"""What a step costs by its rows, measured as it goes: a table for each size of batch.

A row is a token that is computed: one an output that decodes, one more a draft. Times differ in steps (tiles of rows)
and from machine to machine, so nothing is assumed of their shape but that a row is never free of charge for long: what
was not measured yet is taken from its neighbours, and before anything was, from `base` (measured at the start, alone).
Each table has a pace that follows what slows all its steps alike, so that two of them are compared as if measured now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

Cost = Callable[[int], float]
"""Seconds of a step with so many drafts in all."""
MEMORY: Final = 1 - 1 / 64
"""What a mean keeps of its past at each new step."""
STALE: Final = 64
"""Steps after which a mean is old,"""
STALE_MEMORY: Final = 0.5
"""and keeps only this."""
OUTLIER: Final = 2.0
"""A step counts as at most this many times its mean: something else had the machine."""
PACE_SHARE: Final = 1 / 4
"""Of a step's surprise what is put down to the pace of everything: far more than a single mean takes of it."""
SHORTEST: Final = 1e-6
"""Seconds that a step takes at least, however coarse the clock."""
LEAST_SLOPE: Final = 0.003
"""Of the shortest step: what a row takes at least."""
DEFAULT_SLOPE: Final = 0.05
"""Of a step of one row what another costs, where nothing was measured."""


@dataclass(slots=True)
class _Cell:
    """Steps of one number of rows, at the table's pace."""

    seconds: float
    count: int = 2
    """What it began with counts as two steps."""
    last: int = 0
    """The table's step at which it was measured last."""

    def add(self, seconds: float, now: int) -> None:
        seconds = min(seconds, OUTLIER * self.seconds)
        memory = min(MEMORY if now - self.last < STALE else STALE_MEMORY, self.count / (self.count + 1))
        self.seconds = self.seconds * memory + seconds * (1 - memory)
        self.count += 1
        self.last = now


@dataclass(slots=True)
class _Table:
    """Steps of one size of batch. `base` seconds by rows are what cells begin with."""

    base: Mapping[int, float]
    cells: dict[int, _Cell] = field(default_factory=dict)
    steps: int = 0
    pace: float = 1.0
    """How much slower than its cells say everything is of late: contexts grow, others come and go on the machine."""

    def measured(self, rows: int, seconds: float) -> None:
        """A step took this long: what it surprises by is the pace's as far as it goes, the rest its cell's."""
        rung = _rung(rows)
        if (cell := self.cells.get(rung)) is None:
            cell = self.cells[rung] = _Cell(self.at(rung))
        ratio = seconds / (cell.seconds * self.pace)
        if self.steps:
            ratio = min(max(ratio, 1 / OUTLIER), OUTLIER)
        self.pace *= ratio ** max(PACE_SHARE, 1 / (self.steps + 1))
        self.steps += 1
        cell.add(seconds / self.pace, self.steps)

    def at(self, rung: int) -> float:
        """Seconds at pace 1; what was not measured lies between its neighbours, beyond them where the base has it."""
        cells, at_base = self.cells, _between(self.base, rung)
        if rung in cells:
            return cells[rung].seconds
        below = max((other for other in cells if other < rung), default=None)
        above = min((other for other in cells if other > rung), default=None)
        if below is not None and above is not None:
            low, high = cells[below].seconds, cells[above].seconds
            return low + (high - low) * (rung - below) / (above - below)
        near = above if below is None else below
        return at_base if near is None else cells[near].seconds * at_base / _between(self.base, near)


class StepCosts:
    """Seconds of a step by outputs aboard and rows. One thread uses it."""

    def __init__(self, base: Mapping[int, float] | None = None) -> None:
        """`base`: seconds of a step by its rows, as far as measured at the start."""
        self._base = _rising(base) if base else {1: 1.0, 2: 1.0 + DEFAULT_SLOPE}
        self._tables: dict[int, _Table] = {}

    def _table(self, outputs: int) -> _Table:
        batch = outputs.bit_length()
        if (table := self._tables.get(batch)) is None:
            table = self._tables[batch] = _Table(self._base)
        return table

    def measured(self, outputs: int, rows: int, seconds: float) -> None:
        """A step in which nothing but these outputs was computed took this long."""
        self._table(outputs).measured(rows, max(seconds, SHORTEST))

    def seconds(self, outputs: int, rows: int) -> float:
        """What a step of so many rows takes while so many outputs are aboard."""
        return self.line(outputs, rows)(0)

    def line(self, outputs: int, rows: int) -> Cost:
        """The same for `rows` and as many more as it is called with; valid until the next step is measured."""
        table = self._table(outputs)
        found: dict[int, float] = {}

        def seconds(more: int) -> float:
            rung = _rung(rows + more)
            if (value := found.get(rung)) is None:
                value = found[rung] = table.at(rung) * table.pace
            return value

        return seconds

    def age(self, outputs: int, rows: int) -> int:
        """Steps with a batch of this size since one of so many rows was measured; all of them, if none was."""
        table = self._table(outputs)
        cell = table.cells.get(_rung(rows))
        return table.steps - (cell.last if cell is not None else 0)


def _rising(base: Mapping[int, float]) -> dict[int, float]:
    """`base` in order of rows, where more rows always take more: a step that something else held up says nothing."""
    places = sorted(base)
    least = min(base.values()) * LEAST_SLOPE
    slower = [base[place] - least * place for place in places]
    falling = list(accumulate(reversed(slower), min))[::-1]  # the least of what follows: more rows took no longer
    rising = {place: value + least * place for place, value in zip(places, falling, strict=True)}
    if len(places) == 1:
        rising[places[0] + 1] = base[places[0]] * (1 + DEFAULT_SLOPE)
    return rising


def _rung(rows: int) -> int:
    """Numbers of rows that are measured together, by the largest of them: each to 17, then by 4, by 16 from 64 on."""
    if rows <= 17:
        return rows
    step = 4 if rows <= 64 else 16
    return -(-rows // step) * step


def _between(points: Mapping[int, float], rows: int) -> float:
    """Seconds at `rows`, on the line through the two nearest of `points` (sorted, rising); beyond, on the last one."""
    places = list(points)
    if rows <= places[0] or len(places) == 1:
        return points[places[0]]
    high = next((i for i, place in enumerate(places) if place >= rows), len(places) - 1)
    left, right = places[high - 1], places[high]
    return points[left] + (points[right] - points[left]) * (rows - left) / (right - left)
