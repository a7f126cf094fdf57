"""Sequences that benchmarks drive through an engine alone: random prompts, greedy decoding, no end of sequence."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.random_weights import open_random
from engine.batch import Batch, Launched, SampleSpec, Slice
from engine.block_pool import BlockPool
from engine.block_table import BlockTable
from engine.config import DEFAULT_NUM_BLOCKS, Settings
from engine.loading import Engine, load_engine, resolve
from engine.parallel.group import Ranks
from engine.weights.checkpoint import read_config
from tandem.models import resolve_model
from tandem.record import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
BLOCK_SIZE = 16
SMALLEST_STEP = 64
"""Rows that a step has room for however small its chunks are: one for each sequence of a decode step."""

Advance = Callable[[int], None]
"""Called with the number of tokens that were computed since the last call."""


def load_bench_engine(
    model: str, settings: Settings, chunk_size: int, num_blocks: int, ranks: Ranks | None = None
) -> Engine:
    """An engine for benchmarks: `settings` besides, and room for `num_blocks` blocks of BLOCK_SIZE tokens.

    `model` may be "random:SHAPE" (`bench.random_weights`). With `ranks` it is this rank's.

    What is loaded is left out of garbage collections from then on, as the services do.
    """
    checkpoint = open_random(model, str(settings.get("device", "cpu")))
    path = model if checkpoint is not None else resolve_model(model)
    sizes = {
        "model": path,
        "block_size": BLOCK_SIZE,
        "num_blocks": max(DEFAULT_NUM_BLOCKS, num_blocks),
        "max_step_tokens": max(chunk_size, SMALLEST_STEP),
    }
    config = read_config(path) if checkpoint is None else checkpoint.config
    resolved = resolve({**settings, **sizes}, config, ranks.size if ranks is not None else 1)
    engine = load_engine(resolved, checkpoint=checkpoint, ranks=ranks)
    gc.collect()
    gc.freeze()
    return engine


def blocks_of(sequences: int, context_tokens: int, block_size: int = BLOCK_SIZE) -> int:
    """KV blocks of `sequences` that are `context_tokens` long at their end."""
    return sequences * -(-context_tokens // block_size)


@dataclass(slots=True)
class BenchSequence:
    """One sequence of a benchmark: its tokens so far and its blocks."""

    tokens: list[int]
    prompt_len: int
    table: BlockTable
    computed: int = 0


class SequenceDriver:
    """Drives an engine's runner directly with sequences of its own."""

    def __init__(self, engine: Engine, chunk_size: int) -> None:
        """`chunk_size` is the most prompt tokens a step."""
        self.engine = engine
        self.chunk_size = chunk_size
        self.pool = BlockPool(engine.engine_config.num_blocks, engine.engine_config.block_size, prefix_cache=False)
        self.rng = random.Random(0)

    @contextmanager
    def sequences(self, count: int, prompt_tokens: int) -> Iterator[list[BenchSequence]]:
        """`count` sequences of random prompts, nothing of them computed; their blocks are free again afterwards."""
        found = [self._new_sequence(prompt_tokens) for _ in range(count)]
        try:
            yield found
        finally:
            for sequence in found:
                sequence.table.free()

    def _new_sequence(self, prompt_tokens: int) -> BenchSequence:
        vocabulary = self.engine.model_config.vocab_size
        tokens = [self.rng.randrange(vocabulary) for _ in range(prompt_tokens)]
        return BenchSequence(tokens, prompt_tokens, BlockTable(self.pool))

    def prefill(self, sequences: Sequence[BenchSequence], advance: Advance | None = None) -> None:
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
            if advance is not None:
                advance(self.chunk_size - budget)

    def decode(self, sequences: Sequence[BenchSequence]) -> None:
        """One more token for each."""
        self._step([(sequence, len(sequence.tokens)) for sequence in sequences])

    def decode_ahead(self, sequences: Sequence[BenchSequence], steps: int) -> list[float]:
        """`steps` tokens more for each: a step is launched while the one before runs, and takes its tokens on the
        device. Returns the seconds that each launch took the host. Needs a runner that `overlaps`."""
        seconds: list[float] = []
        running: Launched | None = None
        for step in range(steps):
            batch = Batch([self._next_slice(s, place if step else None) for place, s in enumerate(sequences)])
            start = time.perf_counter()
            launched = self.engine.runner.launch(batch)
            seconds.append(time.perf_counter() - start)
            self._take(sequences, running)
            running = launched
        self._take(sequences, running)
        for sequence in sequences:
            sequence.computed = len(sequence.tokens) - 1
        return seconds

    def _next_slice(self, sequence: BenchSequence, follows: int | None) -> Slice:
        """One decode row; with `follows` its token is not known yet."""
        start = sequence.computed
        sequence.computed += 1
        sequence.table.ensure(start + 1)
        token = 0 if follows is not None else sequence.tokens[start]
        spec = SampleSpec(0, GREEDY, start + 1 - sequence.prompt_len)
        return Slice("bench", [token], start, sequence.table.blocks, [spec], follows=follows)

    def _take(self, sequences: Sequence[BenchSequence], launched: Launched | None) -> None:
        if launched is None:
            return
        for sequence, drawn in zip(sequences, launched.collect().samples, strict=True):
            sequence.tokens.append(drawn[0].token_id)

    def _step(self, work: Sequence[tuple[BenchSequence, int]]) -> None:
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
