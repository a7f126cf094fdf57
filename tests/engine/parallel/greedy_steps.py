"""Greedy answers by an engine's runner, batch by batch, with what tells ties from differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.batch import Batch, SampleSpec, Slice
from engine.config import EngineConfig
from engine.loading import Engine, resolve
from engine.weights.checkpoint import read_config
from tandem.record import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Answer:
    """Tokens, their log probabilities, and how far each was ahead of the next likeliest."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def config_of(model: Path, settings: dict[str, Any], ranks: int = 1) -> EngineConfig:
    """For a few short sequences."""
    sizes = {"model": str(model), "device": "cpu", "num_blocks": 64, "threads": 1}
    return resolve({**sizes, **settings}, read_config(model), ranks)


def greedy(engine: Engine, prompts: Sequence[Sequence[int]], count: int, chunk: int) -> list[Answer]:
    """`count` tokens for each of `prompts`, all in one batch, at most `chunk` tokens of each a step."""
    each = -(-(max(map(len, prompts)) + count) // engine.engine_config.block_size)
    answers, computed = [Answer() for _ in prompts], [0] * len(prompts)
    while any(len(answer.tokens) < count for answer in answers):
        slices = []
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if len(answer.tokens) == count:
                continue
            known = [*prompt, *answer.tokens]
            part = known[computed[number] :][:chunk]
            table = list(range(number * each, (number + 1) * each))
            last = computed[number] + len(part) == len(known)
            samples = [SampleSpec(0, GREEDY, len(answer.tokens), logprobs=2)] if last else []
            slices.append(Slice(str(number), part, computed[number], table, samples))
            computed[number] += len(part)
        output = engine.runner.run(Batch(slices))
        assert not output.errors
        for one, drawn in zip(slices, output.samples, strict=True):
            for sample in drawn:
                _take(answers[int(one.request_id)], sample.token_id, sample.logprobs)
    return answers


def _take(answer: Answer, token: int, logprobs: Any) -> None:
    answer.tokens.append(token)
    answer.logprobs.append(logprobs.logprob)
    answer.gaps.append(logprobs.top_logprobs[0] - logprobs.top_logprobs[1])
