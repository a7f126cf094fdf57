"""From logits to tokens: turns a batch's `SampleSpec`s into one call of `kernels.sampling`."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from engine.batch import Batch, SampledToken, StepOutput
from kernels.sampling import ALL_BANNED, BAD_ID, NOT_FINITE, Draw, Drawn, draw_tokens
from tandem.errors import InternalError, TandemError
from tandem.record import TokenLogprobs

FAILURES: Final = {
    NOT_FINITE: "the model's logits are not finite numbers",
    BAD_ID: "a penalty, a bias or a ban names a token id outside the vocabulary",
    ALL_BANNED: "every token id is banned",
}


def sample(batch: Batch, logits: Tensor) -> StepOutput:
    """Draw every token that `batch` asks for.

    `logits` is float32 [R, V], one row for each slice with samples, in order. A slice with NaN or
    +inf logits, or with settings that can't be met, fails alone: see `StepOutput.errors`.
    """
    draws: list[Draw] = []
    row = 0
    for part in batch.slices:
        if part.samples:
            draws.extend(Draw(row, spec) for spec in part.samples)
            row += 1
    drawn = iter(draw_tokens(logits, draws))
    samples: list[list[SampledToken]] = []
    errors: dict[int, TandemError] = {}
    for number, part in enumerate(batch.slices):
        results = [next(drawn) for _ in part.samples]
        failure = min((result.token_id for result in results), default=0)
        if failure < 0:
            errors[number] = InternalError(f"{part.request_id}: {FAILURES[failure]}")
            samples.append([])
        else:
            samples.append([_sampled(result) for result in results])
    return StepOutput(samples, errors)


def _sampled(result: Drawn) -> SampledToken:
    if result.logprob is None:
        return SampledToken(result.token_id)
    return SampledToken(result.token_id, TokenLogprobs(result.logprob, result.top_token_ids, result.top_logprobs))
