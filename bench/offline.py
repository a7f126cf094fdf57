"""The engine alone: no gateway, no sockets, one process.

    python -m bench.offline --model default --points pp512,pp8x512,tg1,tg8 --json

ppN is one N-token prompt, ppBxN is B of them, tgB is B sequences of 128 tokens in and 128 out, decode only; tgB@N has
N tokens in. Prompts are random token ids, decoding is greedy, end-of-sequence is ignored and the prefix cache is off.
Prints one JSON object a line; each figure is the median over `--runs` runs after one that is not counted (points with
more than 16,384 prompt tokens: one run).
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.points import Point, parse_points, run_points
from bench.report import emit
from engine.batch import Batch, SampleSpec, Slice
from engine.block_pool import BlockPool
from engine.block_table import BlockTable
from engine.config import DEFAULT_NUM_BLOCKS
from engine.loading import Engine, load_engine, resolve
from engine.weights.checkpoint import read_config
from tandem.models import resolve_model
from tandem.record import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
BLOCK_SIZE = 16


@dataclass(slots=True)
class _Sequence:
    """One sequence of a benchmark: its tokens so far and its blocks."""

    tokens: list[int]
    prompt_len: int
    table: BlockTable
    computed: int = 0


class OfflineBench:
    """Drives an engine's runner directly with sequences of its own."""

    def __init__(self, engine: Engine, chunk_size: int) -> None:
        """`chunk_size` is the most prompt tokens a step."""
        self.engine = engine
        self.chunk_size = chunk_size
        self.pool = BlockPool(engine.engine_config.num_blocks, engine.engine_config.block_size, prefix_cache=False)
        self.rng = random.Random(0)

    def measure(self, point: Point) -> float:
        """Tokens a second at one point."""
        sequences = [self._new_sequence(point.prompt_tokens) for _ in range(point.sequences)]
        try:
            start = time.perf_counter()
            self._prefill(sequences)
            prefill_seconds = time.perf_counter() - start
            if not point.output_tokens:
                return point.sequences * point.prompt_tokens / prefill_seconds
            start = time.perf_counter()
            for _ in range(point.output_tokens - 1):
                self._step([(sequence, len(sequence.tokens)) for sequence in sequences])
            return point.sequences * (point.output_tokens - 1) / (time.perf_counter() - start)
        finally:
            for sequence in sequences:
                sequence.table.free()

    def _new_sequence(self, prompt_tokens: int) -> _Sequence:
        vocabulary = self.engine.model_config.vocab_size
        tokens = [self.rng.randrange(vocabulary) for _ in range(prompt_tokens)]
        return _Sequence(tokens, prompt_tokens, BlockTable(self.pool))

    def _prefill(self, sequences: Sequence[_Sequence]) -> None:
        """Computes all prompts, filling each step up to the chunk size across sequences."""
        while pending := [sequence for sequence in sequences if sequence.computed < sequence.prompt_len]:
            budget = self.chunk_size
            work = []
            for sequence in pending:
                end = min(sequence.prompt_len, sequence.computed + budget)
                if end == sequence.computed:
                    break
                work.append((sequence, end))
                budget -= end - sequence.computed
            self._step(work)

    def _step(self, work: Sequence[tuple[_Sequence, int]]) -> None:
        """One step: each sequence computes its tokens up to `end` and samples when that is all it has."""
        slices = []
        for sequence, end in work:
            sequence.table.ensure(end)
            samples = []
            if end == len(sequence.tokens):
                position = end - sequence.prompt_len
                samples = [SampleSpec(0, GREEDY, position, (), (), (), None)]
            tokens = sequence.tokens[sequence.computed : end]
            slices.append(Slice("bench", tokens, sequence.computed, sequence.table.blocks, samples))
        output = self.engine.runner.run(Batch(slices, []))
        for (sequence, end), drawn in zip(work, output.samples, strict=True):
            sequence.computed = end
            sequence.tokens.extend(sample.token_id for sample in drawn)


def blocks_for(points: Sequence[Point], block_size: int) -> int:
    """KV blocks that the largest of `points` needs."""
    return max(point.sequences * -(-point.context_tokens // block_size) for point in points)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.offline", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default", help="default, or a path to a GGUF file or Hugging Face folder")
    parser.add_argument("--points", default="pp512,pp8x512,tg1,tg4,tg8,tg16,tg32")
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="one JSON object a line (the default prints a table)")
    arguments = parser.parse_args()
    points = parse_points(arguments.points)
    path = resolve_model(arguments.model)
    settings = {
        "model": path,
        "compute": arguments.compute,
        "dtype": arguments.dtype,
        "block_size": BLOCK_SIZE,
        "num_blocks": max(DEFAULT_NUM_BLOCKS, blocks_for(points, BLOCK_SIZE)),
        "max_step_tokens": max(arguments.chunk_size, 64),
        "threads": arguments.threads,
    }
    engine = load_engine(resolve(settings, read_config(path)))
    gc.collect()
    gc.freeze()  # as the services do
    bench = OfflineBench(engine, arguments.chunk_size)
    emit(run_points(bench.measure, points, arguments.runs), as_json=arguments.json)


if __name__ == "__main__":
    main()
