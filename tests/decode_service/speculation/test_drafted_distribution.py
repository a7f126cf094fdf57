"""21,000 tokens drawn with drafts have the probabilities that the model gives them; wrong verification is found out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from chi_square import REJECTED, kept_probabilities, p_value
from tiny_llama import save_tiny_llama

from decode_service.config import SchedulerConfig
from decode_service.events import Tokens
from decode_service.scheduler import Scheduler
from decode_service.speculation.config import SpeculationConfig
from decode_service.speculation.proposer import Ask, Draft, OutputKey
from decode_service.speculation.speculator import Speculator
from engine import sampler
from engine.batch import SampleSpec, Slice
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.loading import Engine, load_engine
from engine.runner import build_meta, sampled_rows
from tandem.record import OutputState, Record, SamplingParams, StopRules

VOCABULARY, PROMPT, CHOICES, OUTPUTS, ABOARD = 7, [3, 1, 4, 1, 5], 16, 7_008, 512
COUNTED = 3
"""Tokens of each output that are looked at: the first from the prompt, the others with drafts behind it."""


class Guess:
    """Two drafts an output and step, of all kinds, most of them wrong."""

    name = "guess"
    cheap = True

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        turns = (sum(ask.output) + 3 * ask.key.output for ask in asks)
        return [
            Draft([turn % VOCABULARY, turn // 7 % VOCABULARY][: ask.limit])
            for ask, turn in zip(asks, turns, strict=True)
        ]

    def observe(self, key: OutputKey, tokens: Sequence[int], accepted: int) -> None:
        """Nothing is learned."""

    def finished(self, key: OutputKey) -> None:
        """Nothing is kept."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine OpenMP barriers slow small steps tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model = save_tiny_llama(tmp_path_factory.mktemp("seven"), layers=1, vocabulary=VOCABULARY)
    return load_engine(EngineConfig(model=str(model), num_blocks=2 * ABOARD, max_sequences=ABOARD, threads=1))


def counted(engine: Engine, params: SamplingParams) -> tuple[Any, int]:
    """How often which tokens began an output [V, V, V], and how many drafts were kept."""
    pool = BlockPool(2 * ABOARD, 16)
    config = SchedulerConfig(4096, ABOARD, 256, VOCABULARY)
    speculator = Speculator(SpeculationConfig([Guess()], max_tokens=2, fixed=True), VOCABULARY)
    scheduler = Scheduler(config, pool, speculator)
    found: dict[tuple[str, int], list[int]] = {}
    waiting = iter(range(OUTPUTS // CHOICES))
    while True:
        free = ABOARD - scheduler.load().running_sequences
        for seed in itertools.islice(waiting, free // CHOICES):
            asked = SamplingParams(params.temperature, top_p=params.top_p, seed=seed, n=CHOICES)
            outputs = [OutputState() for _ in range(CHOICES)]
            record = Record(str(seed), "", list(PROMPT), asked, StopRules(COUNTED + 1, ignore_eos=True), outputs)
            scheduler.admit(str(seed), record, local=True)
        if (batch := scheduler.schedule()) is None:
            break
        for event in scheduler.update(batch, engine.runner.run(batch)):
            for delta in event.deltas if isinstance(event, Tokens) else ():
                found.setdefault((event.key, delta.index), []).extend(delta.token_ids)
    assert len(found) == OUTPUTS
    firsts = np.array([tokens[:COUNTED] for tokens in found.values()])
    counts = np.bincount(firsts @ VOCABULARY ** np.arange(COUNTED)[::-1], minlength=VOCABULARY**COUNTED)
    return counts, speculator.counts["guess"].accepted_tokens


def right(engine: Engine, params: SamplingParams) -> Any:
    """The model's own probabilities of the first tokens, with none of the sampler's code."""
    out = np.zeros([VOCABULARY] * COUNTED)
    contexts = [list(c) for n in range(COUNTED) for c in itertools.product(range(VOCABULARY), repeat=n)]
    spec = [SampleSpec(0, SamplingParams(), 0)]
    parts = [Slice("r", [*PROMPT, *context], 0, [i], spec) for i, context in enumerate(contexts)]
    token_ids, meta = build_meta(parts, 16)
    logits = engine.runner.model.step(token_ids, meta, engine.kv_cache, sampled_rows(parts, meta)).logits.double()
    next_token = {
        tuple(context): kept_probabilities(row, params.temperature, params.top_p)
        for context, row in zip(contexts, logits.numpy(), strict=True)
    }
    for tokens in itertools.product(range(VOCABULARY), repeat=COUNTED):
        out[tokens] = np.prod([next_token[tokens[:place]][tokens[place]] for place in range(COUNTED)])
    return out


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_outputs_with_drafts_have_the_models_probabilities(engine: Engine, temperature: float) -> None:
    params = SamplingParams(temperature, top_p=0.9)
    counts, kept = counted(engine, params)
    assert kept > 500
    assert p_value(counts, right(engine, params)) > REJECTED
    assert p_value(counts, right(engine, SamplingParams(temperature + 0.1, top_p=0.9))) < REJECTED


def test_drafts_that_are_kept_unseen_are_found_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verification that keeps what was drawn behind drafts that were wrong."""
    draws = sampler._draws
    monkeypatch.setattr(sampler, "_draws", lambda batch: [replace(draw, follows=False) for draw in draws(batch)])
    monkeypatch.setattr(Slice, "standing", lambda self, drawn: self.drafts + 1)
    params = SamplingParams(0.7, top_p=0.9)
    assert p_value(counted(engine, params)[0], right(engine, params)) < REJECTED
