"""Rotary position embedding: tables of cosines and sines for every scaling.

The inverse frequencies follow `transformers.modeling_rope_utils` operation by operation in float32, and so does the
product with the position: at position 8,000 one bit of either turns an angle by 5e-4.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from engine.config import RopeConfig

_CHUNK_POSITIONS: Final = 4096


def rope_tables(rope: RopeConfig, max_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each float32 [max_positions, rotary_dim / 2], times yarn's attention factor."""
    frequencies, factor = inverse_frequencies(rope)
    half = frequencies.numel()
    cos, sin = torch.empty(max_positions, half), torch.empty(max_positions, half)
    for start in range(0, max_positions, _CHUNK_POSITIONS):
        stop = min(start + _CHUNK_POSITIONS, max_positions)
        positions = torch.arange(start, stop, dtype=torch.float32)
        # Through float64, so that the rounded result is the same whatever vector code torch picks.
        angles = (positions[:, None] * frequencies).double()
        cos[start:stop] = angles.cos().float() * factor
        sin[start:stop] = angles.sin().float() * factor
    return cos, sin


def inverse_frequencies(rope: RopeConfig) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [rotary_dim / 2], and the factor on cosines and sines."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    period = rope.theta**exponents
    factor = 1.0
    if rope.kind == "yarn":
        frequencies, factor = _yarn(rope, period)
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, 1.0 / period)
    else:
        frequencies = 1.0 / period
        if rope.kind == "linear":
            frequencies = frequencies / rope.factor
    if rope.frequency_factors is not None:
        frequencies = frequencies / torch.tensor(rope.frequency_factors, dtype=torch.float32)
    return frequencies, factor


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
    assert rope.original_max_context is not None, "checked when the config was read"
    low, high = rope.low_freq_factor, rope.high_freq_factor
    waves = 2 * math.pi / frequencies
    longest, shortest = rope.original_max_context / low, rope.original_max_context / high
    scaled = torch.where(waves > longest, frequencies / rope.factor, frequencies)
    smooth = (rope.original_max_context / waves - low) / (high - low)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(waves < shortest) & ~(waves > longest)
    return torch.where(between, blended, scaled)


def _yarn(rope: RopeConfig, period: Tensor) -> tuple[Tensor, float]:
    """NTK by parts (YaRN, arXiv:2309.00071), as transformers computes it."""
    low, high = _yarn_range(rope)
    ramp = torch.clamp((torch.arange(period.numel(), dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    frequencies = (1.0 / (rope.factor * period)) * (1 - keep) + (1.0 / period) * keep
    return frequencies, _yarn_attention_factor(rope)


def _yarn_range(rope: RopeConfig) -> tuple[float, float]:
    """The dimensions between which frequencies go over from kept to interpolated."""
    assert rope.original_max_context is not None, "checked when the config was read"
    context, dim = rope.original_max_context, rope.rotary_dim

    def dimension(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(scale: float, weight: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0
