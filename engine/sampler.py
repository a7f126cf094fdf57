"""From logits to tokens: turns a batch's `SampleSpec`s into one call of `kernels.sampling`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from engine.batch import Batch, SampledToken, Slice, StepOutput
from engine.models.meta import NOT_PICKED, Predictions
from kernels.sampling import ALL_BANNED, BAD_ID, NOT_FINITE, SKIPPED, Draw, Drawn, draw_tokens
from tandem.errors import InternalError, TandemError
from tandem.record import TokenLogprobs

FAILURES: Final = {
    NOT_FINITE: "the model's logits are not finite numbers",
    BAD_ID: "a penalty, a bias or a ban names a token id outside the vocabulary",
    ALL_BANNED: "every token id is banned",
}


def greedy_rows(batch: Batch) -> Tensor | None:
    """Which of the R rows that are sampled need their largest logit only: uint8 [R], or None when none does."""
    flags = [flag for part in batch.slices for flag in _takes_largest(part)]
    return torch.tensor(flags, dtype=torch.uint8) if any(flags) else None


def _takes_largest(part: Slice) -> list[bool]:
    """Whether each sampled row of a slice needs its largest logit only."""
    if part.drafts:
        return [spec.takes_largest for spec in part.samples]
    return [all(spec.takes_largest for spec in part.samples)] if part.samples else []


def sample(batch: Batch, predictions: Predictions) -> StepOutput:
    """Draw every token that `batch` asks for.

    `predictions` has `num_sampled_rows` rows for each slice, in order. A slice with NaN or +inf logits, or with
    settings that can't be met, fails alone: see `StepOutput.errors`.
    """
    best: list[int] = predictions.best.tolist() if predictions.best is not None else []
    if best and (output := _all_picked(batch, best)) is not None:
        return output
    wanted = draws_of(batch)
    picked = [best[draw.row] for draw in wanted] if best else [NOT_PICKED] * len(wanted)
    draws = [draw for draw, token in zip(wanted, picked, strict=True) if token == NOT_PICKED]
    drawn = iter(draw_tokens(predictions.logits, draws))
    return assemble(batch, [next(drawn) if token == NOT_PICKED else Drawn(token) for token in picked])


def _all_picked(batch: Batch, best: list[int]) -> StepOutput | None:
    """The usual greedy step: no drafts, and the largest logit of every row is known and sound."""
    if min(best) < 0 or any(part.drafts for part in batch.slices):
        return None
    rows = iter(best)
    return StepOutput([[SampledToken(next(rows))] * len(part.samples) if part.samples else [] for part in batch.slices])


def draws_of(batch: Batch) -> list[Draw]:
    """Every draw of a step, in order, with its row in `Predictions`."""
    return list(_draws(batch))


def assemble(batch: Batch, answers: Sequence[Drawn]) -> StepOutput:
    """What `draws_of` brought, slice by slice."""
    drawn = iter(answers)
    samples: list[list[SampledToken]] = []
    errors: dict[int, TandemError] = {}
    for number, part in enumerate(batch.slices):
        results = _standing(part, [next(drawn) for _ in part.samples])
        failure = min((result.token_id for result in results), default=0)
        if failure < 0:
            errors[number] = InternalError(f"{part.request_id}: {FAILURES[failure]}")
            samples.append([])
        else:
            samples.append([_sampled(result) for result in results])
    return StepOutput(samples, errors)


def _draws(batch: Batch) -> Iterator[Draw]:
    """A draw for each spec, from its row of the predictions. Those of drafts that are not the largest logit only follow
    each other."""
    row = 0
    for part in batch.slices:
        if not part.drafts:
            yield from (Draw(row, spec) for spec in part.samples)
            row += part.num_sampled_rows
            continue
        follows = False
        for spec, expected in zip(part.samples, (*part.token_ids[part.num_known :], SKIPPED), strict=True):
            yield Draw(row, spec, follows, expected)
            follows = not spec.takes_largest
            row += 1


def _standing(part: Slice, results: list[Drawn]) -> list[Drawn]:
    """What counts of a slice's draws. A failure behind drafts that agreed waits for the step that draws it alone."""
    if not part.drafts:
        return results
    tokens = [result.token_id for result in results]
    count = part.standing(tokens)
    return results[: count - 1] if count > 1 and tokens[count - 1] < 0 else results[:count]


def _sampled(result: Drawn) -> SampledToken:
    if result.logprob is None:
        return SampledToken(result.token_id)
    return SampledToken(result.token_id, TokenLogprobs(result.logprob, result.top_token_ids, result.top_logprobs))
