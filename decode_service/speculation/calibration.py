"""What steps cost by their rows, measured once before the first request: see `costs`."""

from __future__ import annotations

import time
from typing import Final

from engine.batch import Batch, SampleSpec, Slice, StepRunner
from tandem.record import SamplingParams

ROWS: Final = (1, 16, 64, 32, 4, 8, 17, 33, 48, 2, 24, 12, 40, 20)
"""From rough to fine, for engines on which there isn't time for all."""
REPEATS: Final = 3
LONGEST: Final = 1.5
"""Seconds after which the numbers of rows that are left are not measured."""


def measure(runner: StepRunner, num_blocks: int, block_size: int, most_rows: int) -> dict[int, float]:
    """Seconds of a step by its rows, each of them sampled; the least of a few. Writes to the first blocks.

    Before any request is there, on an engine that is warm.
    """
    room = min(num_blocks * block_size, most_rows)
    found: dict[int, float] = {}
    began = time.perf_counter()
    for rows in ROWS:
        if rows > room:
            continue
        if found and time.perf_counter() - began > LONGEST:
            break
        found[rows] = min(_seconds(runner, _batch(rows, block_size)) for _ in range(REPEATS))
    return found


def _batch(rows: int, block_size: int) -> Batch:
    greedy = SamplingParams(temperature=0.0)
    specs = [SampleSpec(0, greedy, place, [0], [0] * place) for place in range(rows)]
    return Batch([Slice("costs", [0] * rows, 0, list(range(-(-rows // block_size))), specs, drafts=rows - 1)])


def _seconds(runner: StepRunner, batch: Batch) -> float:
    began = time.perf_counter()
    runner.run(batch)
    return time.perf_counter() - began
