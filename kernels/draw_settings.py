"""Settings of draws as columns of numbers, for samplers that read them from a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.sampling import Draw, Drawn, noise_key

LOWEST: Final = -745.13
"""exp gives 0 in float64 below this, and what has no weight is not drawn."""
COLUMNS: Final = {
    "rows": np.int32,
    "inverse": np.float64,
    "top_k": np.int32,
    "top_p": np.float64,
    "lowest": np.float64,
    "keys": np.int64,
}
"""Row of the logits; 1 / temperature, 0 for greedy; 0 for all; share; log(min_p); the 64 bits of the noise's key."""


def settings_columns(draws: Sequence[Draw], padded: int = 0) -> dict[str, npt.NDArray[Any]]:
    """One array for each of COLUMNS, of len(draws) entries, or `padded` ones: greedy draws of row 0 behind them.

    Penalties, biases and banned ids are not among them: they are edited into the logits.
    """
    count = max(len(draws), padded)
    columns: dict[str, npt.NDArray[Any]] = {name: np.zeros(count, dtype) for name, dtype in COLUMNS.items()}
    columns["top_p"].fill(1.0)
    columns["lowest"].fill(LOWEST)
    columns["rows"][: len(draws)] = [draw.row for draw in draws]
    for i, draw in enumerate(draws):
        params, spec = draw.spec.params, draw.spec
        if params.greedy:
            continue
        key = noise_key(params.seed, spec.index, spec.position)
        columns["inverse"][i] = min(1.0 / params.temperature, 1e30)
        columns["top_k"][i], columns["top_p"][i] = params.top_k, params.top_p
        columns["lowest"][i] = max(math.log(params.min_p) if params.min_p > 0 else -math.inf, LOWEST)
        columns["keys"][i] = key - (1 << 64) if key >> 63 else key
    return columns


def edits_logits(draw: Draw) -> bool:
    """True when the draw has penalties, biases or banned ids."""
    params = draw.spec.params
    return params.has_penalties or bool(params.logit_bias) or bool(draw.spec.suppress)


def ids_fit(draw: Draw, vocabulary: int) -> bool:
    """False when a penalty, a bias or a ban names a token id outside the vocabulary."""
    spec, params = draw.spec, draw.spec.params
    prompt = spec.prompt if params.repetition_penalty != 1.0 else ()
    named = (*prompt, *(spec.output if params.has_penalties else ()), *params.logit_bias, *spec.suppress)
    return all(0 <= token < vocabulary for token in named)


def drawn_of(draws: Sequence[Draw], values: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> list[Drawn]:
    """What was drawn, from a sampler's results on the CPU: int32 [3, N] (tokens; the bits of their log probabilities;
    and of normalisers), int32 and float32 [N, most]."""
    tokens, logprobs = values[0].tolist(), values[1].view(torch.float32).tolist()
    if not top_ids.shape[1] and all(draw.spec.logprobs is None for draw in draws):
        return [Drawn(token) for token in tokens[: len(draws)]]
    ids, shares = top_ids.tolist(), top_logprobs.tolist()
    results: list[Drawn] = []
    for i, draw in enumerate(draws):
        wanted = draw.spec.logprobs
        if wanted is None or tokens[i] < 0:
            results.append(Drawn(tokens[i]))
        else:
            results.append(Drawn(tokens[i], logprobs[i], tuple(ids[i][:wanted]), tuple(shares[i][:wanted])))
    return results
