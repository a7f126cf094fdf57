"""From logits to tokens: turns a batch's `SampleSpec`s into one call of `kernels.sampling`."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from engine.batch import Batch, SampledToken, StepOutput
from engine.models.meta import NOT_PICKED, Predictions
from kernels.sampling import ALL_BANNED, BAD_ID, NOT_FINITE, Draw, Drawn, draw_tokens
from tandem.errors import InternalError, TandemError
from tandem.record import TokenLogprobs

FAILURES: Final = {
    NOT_FINITE: "the model's logits are not finite numbers",
    BAD_ID: "a penalty, a bias or a ban names a token id outside the vocabulary",
    ALL_BANNED: "every token id is banned",
}


def greedy_rows(batch: Batch) -> Tensor | None:
    """Which of the R rows that are sampled need their largest logit only: uint8 [R], or None when none does."""
    flags = [all(spec.takes_largest for spec in part.samples) for part in batch.slices if part.samples]
    return torch.tensor(flags, dtype=torch.uint8) if any(flags) else None


def sample(batch: Batch, predictions: Predictions) -> StepOutput:
    """Draw every token that `batch` asks for.

    `predictions` has one row for each slice with samples, in order. A slice with NaN or +inf logits, or with settings
    that can't be met, fails alone: see `StepOutput.errors`.
    """
    parts = [part for part in batch.slices if part.samples]
    picked = [NOT_PICKED] * len(parts) if predictions.best is None else predictions.best.tolist()
    draws = [Draw(row, spec) for row, part in enumerate(parts) if picked[row] == NOT_PICKED for spec in part.samples]
    drawn, best = iter(draw_tokens(predictions.logits, draws)), iter(picked)
    samples: list[list[SampledToken]] = []
    errors: dict[int, TandemError] = {}
    for number, part in enumerate(batch.slices):
        token = next(best) if part.samples else NOT_PICKED
        results = [next(drawn) if token == NOT_PICKED else Drawn(token) for _ in part.samples]
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
