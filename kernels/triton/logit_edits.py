"""Penalties, biases and banned ids, edited into rows of logits on a GPU, in the order and rounding of
`kernels.sampling`: each named token once, in float64."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.sampling import Draw
from kernels.triton.launch import Launch

BLOCK = 128


@triton.jit
def _edit(
    logits_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    penalty_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    flags_ptr: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """flags: 1 the token has been seen (repetition, penalty), 2 it has a bias, 4 it is banned. -inf stays."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    place = logits_ptr + tl.load(offset_ptr + at, mask=mask, other=0)
    before = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    flags = tl.load(flags_ptr + at, mask=mask, other=0)
    x = tl.where(before == float("-inf"), 0.0, before).to(tl.float64)
    repetition = tl.load(repetition_ptr + at, mask=mask, other=1.0)
    seen = tl.where(x > 0, x / repetition, x * repetition) - tl.load(penalty_ptr + at, mask=mask, other=0.0)
    most = 3.4028234663852886e38
    seen = tl.minimum(tl.maximum(seen, -most), most).to(tl.float32).to(tl.float64)
    x = tl.where(flags & 1 != 0, seen, x)
    biased = x + tl.load(bias_ptr + at, mask=mask, other=0.0)
    x = tl.where(flags & 2 != 0, tl.minimum(tl.maximum(biased, -most), most), x)
    after = tl.where((flags & 4 != 0) | (before == float("-inf")), float("-inf"), x.to(tl.float32))
    # A NaN or +inf that came in must still be found by the draw.
    after = tl.where((before != before) | (before == float("inf")), before, after)
    tl.store(place, after.to(logits_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Edits:
    """One entry for each token that a draw names: where it is in the logits, and what happens to it."""

    offsets: torch.Tensor  # int64
    repetition: torch.Tensor  # float64
    penalties: torch.Tensor  # float64: presence and frequency
    biases: torch.Tensor  # float64
    flags: torch.Tensor  # int32


def pack_edits(draws: list[Draw], stride: int, device: torch.device) -> Edits | None:
    """What the draws do to their rows, None for nothing."""
    entries: list[tuple[int, float, float, float, int]] = []
    for draw in draws:
        params, spec = draw.spec.params, draw.spec
        output = spec.output if params.has_penalties else ()
        counts = Counter(output)
        flags = dict.fromkeys((*output, *(spec.prompt if params.repetition_penalty != 1.0 else ())), 1)
        for token in params.logit_bias:
            flags[token] = flags.get(token, 0) | 2
        for token in spec.suppress:
            flags[token] = flags.get(token, 0) | 4
        for token, flag in flags.items():
            given = counts[token]
            penalty = (params.presence_penalty + params.frequency_penalty * given) if given else 0.0
            bias = params.logit_bias.get(token, 0.0)
            entries.append((draw.row * stride + token, params.repetition_penalty, penalty, bias, flag))
    if not entries:
        return None
    dtypes = (torch.int64, torch.float64, torch.float64, torch.float64, torch.int32)
    columns = zip(zip(*entries, strict=True), dtypes, strict=True)
    return Edits(*(torch.tensor(values, dtype=dtype, device=device) for values, dtype in columns))


def edit_launch(logits: torch.Tensor, edits: Edits) -> Launch:
    """The launch that edits all rows in place."""
    count = edits.offsets.shape[0]
    args = {
        "logits_ptr": logits,
        "offset_ptr": edits.offsets,
        "repetition_ptr": edits.repetition,
        "penalty_ptr": edits.penalties,
        "bias_ptr": edits.biases,
        "flags_ptr": edits.flags,
        "count": count,
    }
    return Launch(_edit, (-(-count // BLOCK),), args, {"BLOCK": BLOCK}, num_warps=1)
