"""What a decode worker's step costs beside its model: milliseconds of the host by what they go to.

    python -m bench.host                        # a table for 1, 8 and 32 sequences; some seconds
    python -m bench.host --sequences 32 --json

The real scheduler, step inputs, drawing, books, metrics and publication, on one thread one after another, around a
model that names the largest logit of each row at once. Medians over steps of greedy sequences without drafts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from bench.report import emit
from decode_service import messages
from decode_service.config import SchedulerConfig
from decode_service.events import Tokens
from decode_service.metrics import StepMetrics
from decode_service.scheduler import Scheduler
from engine.batch import Batch
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.models.meta import Predictions
from engine.runner import HostSteps
from tandem.record import OutputState, Record, SamplingParams, Speculation, StopRules, TokenDelta
from tandem.service.metrics import Metrics

CONTEXT, BLOCK_SIZE, VOCABULARY = 256, 16, 49_152
PROMPT = 64
PIECES = ("schedule", "inputs and draws", "update", "metrics", "publish")


class _NoModel:
    """In place of a model: every row's largest logit is that of token 7."""

    def step(self, token_ids: torch.Tensor, meta: Any, cache: Any, rows: torch.Tensor, greedy: Any) -> Predictions:
        """See `FusedModel.step`."""
        return Predictions(torch.empty(len(rows), VOCABULARY), torch.full((len(rows),), 7))


class _NoCache:
    """Its memory: nothing is copied."""

    blocks = torch.empty(0)


class Host:
    """One worker's engine thread and event loop, called by hand."""

    def __init__(self, sequences: int) -> None:
        """All of `sequences` decode, their prompts computed."""
        limits = SchedulerConfig(sequences * PROMPT, sequences, CONTEXT, VOCABULARY)
        self._scheduler = Scheduler(limits, BlockPool(sequences * CONTEXT // BLOCK_SIZE, BLOCK_SIZE))
        self._metrics = StepMetrics(Metrics("decode"))
        model: Any = _NoModel()
        cache: Any = _NoCache()
        self._steps = HostSteps(model, cache, EngineConfig("", block_size=BLOCK_SIZE))
        self._sequences = sequences
        for number in range(sequences):
            self._scheduler.admit(str(number), _record(number), local=True)
        while self._step(defaultdict(list)) > 0:
            pass

    def steps(self, count: int) -> Mapping[str, list[float]]:
        """Seconds of each piece, of so many steps."""
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(count):
            self._step(seconds)
        return seconds

    def _step(self, seconds: dict[str, list[float]]) -> int:
        """One step; how many of its slices were of prompts."""
        marks = [time.perf_counter()]
        batch = self._scheduler.schedule()
        assert batch is not None
        marks.append(time.perf_counter())
        with torch.inference_mode():
            output = self._steps.launch(batch).collect()
        marks.append(time.perf_counter())
        events = self._scheduler.update(batch, output)
        marks.append(time.perf_counter())
        self._tell(batch)
        marks.append(time.perf_counter())
        feed: dict[int, list[TokenDelta]] = {int(e.key): e.deltas for e in events if isinstance(e, Tokens)}
        messages.feed_to_pb(feed).SerializeToString()
        marks.append(time.perf_counter())
        for piece, (start, end) in zip(PIECES, pairwise(marks), strict=True):
            seconds[piece].append(end - start)
        return sum(len(part.token_ids) > 1 for part in batch.slices)

    def _tell(self, batch: Batch) -> None:
        self._scheduler.timed(batch, 0.02)
        self._metrics.step(batch, 0.02)
        self._metrics.observe(self._scheduler.load(), self._scheduler)


def _record(number: int) -> Record:
    prompt = [(number * 31 + place) % VOCABULARY for place in range(PROMPT)]
    stopping = StopRules(max_tokens=CONTEXT - PROMPT, ignore_eos=True)
    greedy, alone = SamplingParams(temperature=0.0), Speculation(mode="off")
    return Record(str(number), "", prompt, greedy, stopping, [OutputState()], speculation=alone)


def row_of(sequences: int, steps: int) -> Mapping[str, object]:
    """Medians in milliseconds."""
    seconds = Host(sequences).steps(steps)
    pieces = {piece: statistics.median(seconds[piece]) * 1e3 for piece in PIECES}
    return {"sequences": sequences, **{k: round(v, 3) for k, v in pieces.items()}, "ms": round(sum(pieces.values()), 3)}


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", default="1,8,32", help="comma-separated")
    parser.add_argument("--steps", type=int, default=128, help="of each, at most 180")
    parser.add_argument("--json", action="store_true", help="JSON lines in place of the table")
    arguments = parser.parse_args()
    emit((row_of(int(n), arguments.steps) for n in arguments.sequences.split(",")), as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
