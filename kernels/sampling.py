"""Drawing tokens from logits, each draw by its own settings. C++: sampling.cpp.

Order: repetition penalty (prompt and output; positive logits divided, others multiplied: Keskar et al. 2019),
presence and frequency penalties (output), bias, banned ids. Log probabilities are the log-softmax of the logits at
this point. Then temperature 0 takes the largest logit (lowest id among equals); otherwise top-k, top-p over what
top-k left (the fewest likeliest tokens with at least that share), min-p (relative to the likeliest), and the Gumbel-
max trick: the token with the largest logit/temperature - log(-log(u)) wins, which draws exactly from the softmax
(Gumbel 1954).

The noise u is a counter-based hash (SplitMix64's finalizer) of (seed, index, position, token id): the same draw gives
the same token whatever else is in the batch, and drafts can be verified by drawing again.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from kernels import build, check, dispatch
from tandem.errors import InternalError
from tandem.record import SamplingParams

DRAW_DTYPE = np.dtype(
    [
        ("row", np.int64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("repetition", np.float64),
        ("presence", np.float64),
        ("frequency", np.float64),
        ("key", np.uint64),
        ("seen_begin", np.int64),
        ("prompt_end", np.int64),
        ("output_end", np.int64),
        ("bias_begin", np.int64),
        ("bias_end", np.int64),
        ("suppress_begin", np.int64),
        ("suppress_end", np.int64),
        ("top_k", np.int32),
        ("logprobs", np.int32),
        ("first", np.int64),
        ("expects", np.int64),
    ]
)
NOT_FINITE, BAD_ID, ALL_BANNED, SKIPPED = -1, -2, -3, -4
"""In place of a token: the row has NaN or +inf; the spec names an id outside the vocabulary; no id is left; an earlier
draw of the run wasn't what it expects."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Spec(Protocol):
    """What `engine.batch.SampleSpec` offers; see there. Properties, because it is frozen."""

    @property
    def index(self) -> int: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def position(self) -> int: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def output(self) -> Sequence[int]: ...
    @property
    def suppress(self) -> tuple[int, ...]: ...
    @property
    def logprobs(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to draw from row `row` of the logits."""

    row: int
    spec: Spec
    follows: bool = False
    """It goes on with the draw before it, as a draft does: same prompt, and an output that begins with that one's. It
    may be SKIPPED when that one, or one before in the run, did not draw what it `expects`."""
    expects: int = SKIPPED
    """The draft that stands here; SKIPPED: none."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn token, or NOT_FINITE, BAD_ID, ALL_BANNED or SKIPPED. `logprob` is None unless asked for."""

    token_id: int
    logprob: float | None = None
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(slots=True)
class _Packed:
    """All draws as arrays."""

    draws: np.ndarray[Any, np.dtype[Any]]
    seen: np.ndarray[Any, np.dtype[np.int32]]
    bias_ids: np.ndarray[Any, np.dtype[np.int32]]
    bias_values: np.ndarray[Any, np.dtype[np.float64]]
    suppress: np.ndarray[Any, np.dtype[np.int32]]


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load_library("sampling.cpp")
    assert lib is not None, "the cpp implementation is selected only when its libraries load"
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    lib.tandem_draw_tokens.argtypes = [pointer, i64, pointer, i64, *[pointer] * 8, i64, ctypes.c_int32]
    lib.tandem_draw_tokens.restype = None
    lib.tandem_draw_bytes.restype = i64
    assert lib.tandem_draw_bytes() == DRAW_DTYPE.itemsize
    return lib


def noise_key(seed: int, index: int, position: int) -> int:
    """The 64-bit key of one draw's noise."""
    key = _mix((seed + _GOLDEN) & _MASK)
    key = _mix((key ^ (index + 1) * 0xD1B54A32D192ED03) & _MASK)
    return _mix((key ^ (position + 1) * 0x8CB92BA72F3D8DD7) & _MASK)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def draw_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """Draw one token for each of `draws` from `logits` float32 [R, V].

    A draw that can't be done fails alone, see `Drawn`. Raises InternalError for a row outside the logits.
    """
    check.rows("logits", logits)
    if not draws:
        return []
    packed = _pack(draws, logits.shape)
    if dispatch.select().name != "cpp":
        return [draw_reference(logits[draw.row], draw.spec) for draw in draws]
    count = len(draws)
    width = max(0, int(packed.draws["logprobs"].max()))
    tokens = np.empty(count, np.int32)
    logprobs = np.empty(count, np.float32)
    top_tokens = np.zeros((count, width), np.int32)
    top_values = np.zeros((count, width), np.float32)
    arrays = (
        packed.seen,
        packed.bias_ids,
        packed.bias_values,
        packed.suppress,
        tokens,
        logprobs,
        top_tokens,
        top_values,
    )
    _library().tandem_draw_tokens(
        logits.data_ptr(),
        logits.shape[1],
        packed.draws.ctypes.data,
        count,
        *(array.ctypes.data for array in arrays),
        width,
        torch.get_num_threads(),
    )
    if width == 0 and int(packed.draws["logprobs"].max()) < 0:
        return [Drawn(token) for token in tokens.tolist()]
    return [_drawn(draw.spec, i, tokens, logprobs, top_tokens, top_values) for i, draw in enumerate(draws)]


def _drawn(spec: Spec, i: int, tokens: Any, logprobs: Any, top_tokens: Any, top_values: Any) -> Drawn:
    if spec.logprobs is None or tokens[i] < 0:
        return Drawn(int(tokens[i]))
    ids, values = top_tokens[i, : spec.logprobs].tolist(), top_values[i, : spec.logprobs].tolist()
    return Drawn(int(tokens[i]), float(logprobs[i]), tuple(ids), tuple(values))


def _pack(draws: Sequence[Draw], shape: torch.Size) -> _Packed:
    """Flatten the draws. Raises InternalError for a row outside [0, rows)."""
    table = np.zeros(len(draws), DRAW_DTYPE)
    seen: list[int] = []
    bias_ids: list[int] = []
    bias_values: list[float] = []
    suppress: list[int] = []
    first = begin = prompt_end = 0
    for i, draw in enumerate(draws):
        spec, params = draw.spec, draw.spec.params
        bias_begin, suppress_begin = len(bias_ids), len(suppress)
        if not draw.follows:
            first, begin = i, len(seen)
            if params.repetition_penalty != 1.0:  # the others leave the prompt alone
                seen.extend(spec.prompt)
            prompt_end = len(seen)
        if params.has_penalties:
            seen.extend(spec.output[len(seen) - prompt_end :])
        bias_ids.extend(params.logit_bias.keys())
        bias_values.extend(params.logit_bias.values())
        suppress.extend(spec.suppress)
        table[i] = (
            draw.row,
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            0 if params.greedy else noise_key(params.seed, spec.index, spec.position),
            begin,
            prompt_end,
            len(seen),
            bias_begin,
            len(bias_ids),
            suppress_begin,
            len(suppress),
            params.top_k,
            -1 if spec.logprobs is None else min(spec.logprobs, shape[1]),
            first,
            draw.expects,
        )
    if table["row"].min() < 0 or table["row"].max() >= shape[0]:
        raise InternalError(f"a draw names a row outside [0, {shape[0]})")
    return _Packed(table, _ids(seen), _ids(bias_ids), np.array(bias_values, np.float64), _ids(suppress))


def _ids(values: list[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Token ids as int32; those that don't fit become -1, which no vocabulary has."""
    try:
        return np.array(values, np.int32)
    except OverflowError:
        return np.array([value if 0 <= value < 1 << 31 else -1 for value in values], np.int32)


def draw_reference(row: torch.Tensor, spec: Spec) -> Drawn:
    """Do what `draw_tokens` does for one draw, by numpy in float64. `row` is float32 [V]."""
    params = spec.params
    seen = [*(spec.prompt if params.repetition_penalty != 1.0 else ()), *(spec.output if params.has_penalties else ())]
    named = [*seen, *params.logit_bias, *spec.suppress]
    if any(not 0 <= token < len(row) for token in named):
        return Drawn(BAD_ID)
    logits = row.numpy().astype(np.float64)
    if np.isnan(logits).any() or logits.max() in (np.inf, -np.inf):
        return Drawn(NOT_FINITE)
    logits = _edited(logits, spec)
    if logits.max() == -np.inf:
        return Drawn(ALL_BANNED)
    token = int(logits.argmax()) if spec.params.greedy else _gumbel_max(logits, spec)
    if spec.logprobs is None:
        return Drawn(token)
    logprobs = logits - (logits.max() + np.log(np.exp(logits - logits.max()).sum()))
    top = np.argsort(-logits, kind="stable")[: spec.logprobs]
    return Drawn(token, float(logprobs[token]), tuple(top.tolist()), tuple(logprobs[top].tolist()))


def _edited(logits: Any, spec: Spec) -> Any:
    """Penalties, bias, banned ids; float32 [V] values in float64, kept finite as the C++ code does, or -inf."""
    params = spec.params
    most = float(np.finfo(np.float32).max)
    out = logits == -np.inf
    logits = np.where(out, 0.0, logits)
    if params.has_penalties:
        seen = np.unique(np.array([*spec.prompt, *spec.output], np.int64))
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        ids, counts = np.unique(np.array(spec.output, np.int64), return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
        logits[seen] = np.clip(logits[seen], -most, most).astype(np.float32)
    for token, value in params.logit_bias.items():
        logits[token] = np.float32(np.clip(logits[token] + value, -most, most))
    logits[list(spec.suppress)] = -np.inf
    logits[out] = -np.inf
    return logits


def _gumbel_max(logits: Any, spec: Spec) -> int:
    params, vocabulary = spec.params, len(logits)
    inverse = min(1.0 / params.temperature, 1e30)
    scaled = logits * inverse
    weights = np.exp((logits - logits.max()) * inverse)
    order = np.argsort(-logits, kind="stable")
    if 0 < params.top_k < vocabulary:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        shares = np.cumsum(weights[order]) / weights[order].sum()
        order = order[: int(np.searchsorted(shares, params.top_p)) + 1]
    order = np.sort(order[(weights[order] >= params.min_p) | (order == order[0])])
    order = order[weights[order] > 0]
    return int(order[np.argmax(scaled[order] + _gumbel(noise_key(params.seed, spec.index, spec.position), order))])


def _gumbel(key: int, ids: Any) -> Any:
    """The noise of token ids int64 [N]: float64 [N]."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return -np.log(-np.log(((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52))
