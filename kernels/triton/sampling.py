"""Drawing tokens from logits on a GPU: `kernels.sampling` there, token for token.

`draw_tokens` takes and returns what the CPU's does; `kernels.sampling.draw_reference` is the reference of both.
`sample` is what a captured graph holds: settings in tensors, results in tensors, nothing waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.draw_settings import drawn_of, ids_fit, settings_columns
from kernels.sampling import BAD_ID, Draw, Drawn
from kernels.triton.draw import draw_launch, top_launch
from kernels.triton.launch import FLOATS, require
from kernels.triton.logit_edits import edit_launch, pack_edits
from tandem.errors import InternalError


@dataclass(frozen=True)
class Settings:
    """N draws as tensors on the GPU."""

    rows: torch.Tensor  # int32: row of the logits
    inverse: torch.Tensor  # float64: 1 / temperature, 0 for greedy
    top_k: torch.Tensor  # int32: 0 for all
    top_p: torch.Tensor  # float64
    lowest: torch.Tensor  # float64: log(min_p), for logits relative to the largest, over the temperature
    keys: torch.Tensor  # int64: the 64 bits of the noise key


@dataclass(frozen=True)
class Sampled:
    """Results of N draws, on the GPU."""

    values: torch.Tensor  # int32 [3, N]: the bits of all that follow
    tokens: torch.Tensor  # int32: an id, or NOT_FINITE or ALL_BANNED of kernels.sampling
    logprobs: torch.Tensor  # float32
    normalisers: torch.Tensor  # float32: logits minus these are log probabilities


def pack_settings(draws: Sequence[Draw], device: torch.device) -> Settings:
    """Settings of draws whose penalties, biases and banned ids are in the logits already."""
    columns = settings_columns(draws)
    return Settings(**{name: torch.from_numpy(values).to(device) for name, values in columns.items()})


def sample(logits: torch.Tensor, settings: Settings) -> Sampled:
    """Draw from logits [R, V] (16 bits or float32, rows may be strided) by `settings`; nothing is waited for.

    Raises InternalError for wrong shapes or dtypes. Rows outside the logits are the caller's to avoid.
    """
    good = logits.dim() == 2 and logits.dtype in FLOATS and logits.stride(1) == 1
    require(good, "logits", logits, "[rows, vocabulary], rows dense")
    # One piece of memory, so that whoever reads results back copies once.
    values = torch.empty((3, settings.rows.shape[0]), dtype=torch.int32, device=logits.device)
    result = Sampled(values, values[0], values[1].view(torch.float32), values[2].view(torch.float32))
    given = (settings.rows, settings.inverse, settings.top_k, settings.top_p, settings.lowest, settings.keys)
    draw_launch(logits, *given, result.tokens, result.logprobs, result.normalisers).run()
    return result


def top_logprobs(
    logits: torch.Tensor, settings: Settings, sampled: Sampled, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32, log probabilities float32) of the `count` likeliest tokens of each draw: [N, count] each."""
    shape = (settings.rows.shape[0], min(count, logits.shape[1]))
    ids = torch.empty(shape, dtype=torch.int32, device=logits.device)
    values = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if shape[1]:
        top_launch(logits, settings.rows, sampled.normalisers, ids, values).run()
    return ids, values


@dataclass(frozen=True)
class Started:
    """Draws that were launched; nothing has been waited for."""

    sampled: Sampled
    top_ids: torch.Tensor  # int32 [N, most]
    top_logprobs: torch.Tensor  # float32 [N, most]


def start_draws(logits: torch.Tensor, draws: Sequence[Draw]) -> Started:
    """Launch one draw for each of `draws` from `logits` [R, V], which are edited in place.

    Ids that draws name must be in the vocabulary. Raises InternalError for a row outside the logits, or one that draws
    with penalties, biases or banned ids share.
    """
    if any(not 0 <= draw.row < logits.shape[0] for draw in draws):
        raise InternalError(f"a draw names a row outside [0, {logits.shape[0]})")
    edits = pack_edits(list(draws), logits.stride(0), logits.device)
    if edits is not None:
        if len({draw.row for draw in draws}) < len(draws):
            raise InternalError("draws with penalties, biases or banned ids must not share rows")
        edit_launch(logits, edits).run()
    settings = pack_settings(draws, logits.device)
    sampled = sample(logits, settings)
    widest = max((draw.spec.logprobs or 0 for draw in draws), default=0)
    return Started(sampled, *top_logprobs(logits, settings, sampled, widest))


def draw_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """Draw one token for each of `draws` from `logits` [R, V], which are edited in place, and wait for them.

    As `kernels.sampling.draw_tokens`, but draws with penalties, biases or banned ids need rows of their own. Raises
    InternalError as `start_draws`.
    """
    vocabulary = logits.shape[1]
    if any(not 0 <= draw.row < logits.shape[0] for draw in draws):
        raise InternalError(f"a draw names a row outside [0, {logits.shape[0]})")
    good = [index for index, draw in enumerate(draws) if ids_fit(draw, vocabulary)]
    results = [Drawn(BAD_ID)] * len(draws)
    if not good:
        return results
    kept = [draws[index] for index in good]
    started = start_draws(logits, kept)
    given = (started.sampled.values.cpu(), started.top_ids.cpu(), started.top_logprobs.cpu())
    for index, drawn in zip(good, drawn_of(kept, *given), strict=True):
        results[index] = drawn
    return results
