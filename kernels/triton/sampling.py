"""Drawing tokens from logits on a GPU: `kernels.sampling` there, token for token.

`draw_tokens` takes and returns what the CPU's does; `kernels.sampling.draw_reference` is the reference of both.
`sample` is what a captured graph holds: settings in tensors, results in tensors, nothing waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.sampling import BAD_ID, Draw, Drawn, noise_key
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

    tokens: torch.Tensor  # int32: an id, or NOT_FINITE or ALL_BANNED of kernels.sampling
    logprobs: torch.Tensor  # float32
    normalisers: torch.Tensor  # float32: logits minus these are log probabilities


def pack_settings(draws: Sequence[Draw], device: torch.device) -> Settings:
    """Settings of draws whose penalties, biases and banned ids are in the logits already."""
    columns: list[tuple[int, float, int, float, float, int]] = []
    for draw in draws:
        params, spec = draw.spec.params, draw.spec
        key = 0 if params.greedy else noise_key(params.seed, spec.index, spec.position)
        inverse = 0.0 if params.greedy else min(1.0 / params.temperature, 1e30)
        # exp gives 0 in float64 below this, and what has no weight is not drawn.
        lowest = max(math.log(params.min_p) if params.min_p > 0 else -math.inf, -745.13)
        signed = key - (1 << 64) if key >> 63 else key
        columns.append((draw.row, inverse, params.top_k, params.top_p, lowest, signed))
    dtypes = (torch.int32, torch.float64, torch.int32, torch.float64, torch.float64, torch.int64)
    given = zip(zip(*columns, strict=True), dtypes, strict=True)
    return Settings(*(torch.tensor(values, dtype=dtype, device=device) for values, dtype in given))


def sample(logits: torch.Tensor, settings: Settings) -> Sampled:
    """Draw from logits [R, V] (16 bits or float32, rows may be strided) by `settings`; nothing is waited for.

    Raises InternalError for wrong shapes or dtypes. Rows outside the logits are the caller's to avoid.
    """
    good = logits.dim() == 2 and logits.dtype in FLOATS and logits.stride(1) == 1
    require(good, "logits", logits, "[rows, vocabulary], rows dense")
    count, device = settings.rows.shape[0], logits.device
    result = Sampled(
        torch.empty(count, dtype=torch.int32, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
    )
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


def draw_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """Draw one token for each of `draws` from `logits` [R, V], which are edited in place.

    As `kernels.sampling.draw_tokens`, but draws with penalties, biases or banned ids need rows of their own. Raises
    InternalError for a row outside the logits, or one that such draws share.
    """
    vocabulary = logits.shape[1]
    if any(not 0 <= draw.row < logits.shape[0] for draw in draws):
        raise InternalError(f"a draw names a row outside [0, {logits.shape[0]})")
    good = [index for index, draw in enumerate(draws) if _ids_fit(draw, vocabulary)]
    results = [Drawn(BAD_ID)] * len(draws)
    if not good:
        return results
    kept = [draws[index] for index in good]
    edits = pack_edits(kept, logits.stride(0), logits.device)
    if edits is not None:
        if len({draw.row for draw in kept}) < len(kept):
            raise InternalError("draws with penalties, biases or banned ids must not share rows")
        edit_launch(logits, edits).run()
    settings = pack_settings(kept, logits.device)
    sampled = sample(logits, settings)
    widest = max((draw.spec.logprobs or 0 for draw in kept), default=0)
    ids, values = (table.tolist() for table in top_logprobs(logits, settings, sampled, widest))
    tokens, logprobs = sampled.tokens.tolist(), sampled.logprobs.tolist()
    for place, index in enumerate(good):
        wanted = kept[place].spec.logprobs
        if wanted is None or tokens[place] < 0:
            results[index] = Drawn(tokens[place])
        else:
            top = (tuple(ids[place][:wanted]), tuple(values[place][:wanted]))
            results[index] = Drawn(tokens[place], logprobs[place], *top)
    return results


def _ids_fit(draw: Draw, vocabulary: int) -> bool:
    spec, params = draw.spec, draw.spec.params
    prompt = spec.prompt if params.repetition_penalty != 1.0 else ()
    named = (*prompt, *(spec.output if params.has_penalties else ()), *params.logit_bias, *spec.suppress)
    return all(0 <= token < vocabulary for token in named)
