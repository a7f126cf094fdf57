"""Pearson's chi-square test of drawn tokens against exact probabilities. No scipy: the tail has a closed form."""

from __future__ import annotations

from math import erfc, exp, lgamma, log, sqrt
from typing import Any

import numpy as np

REJECTED = 0.001
"""A sampler whose p-value is below is wrong, but for one time in a thousand; tests' seeds are fixed, so none flakes."""
LEAST_EXPECTED = 5.0
"""Cells that expect less are counted together (Cochran 1954)."""


def kept_probabilities(logits: Any, temperature: float, top_p: float) -> Any:
    """What temperature and top-p make of `logits` [V], by the definition and with none of the sampler's code."""
    scaled = np.asarray(logits, np.float64) / temperature
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    before = np.cumsum(shares[order]) - shares[order]
    kept = order[before < top_p]
    out = np.zeros_like(shares)
    out[kept] = shares[kept] / shares[kept].sum()
    return out


def p_value(counts: Any, probabilities: Any) -> float:
    """How likely counts as far off as these are, if `probabilities` are true; 0 when something impossible was drawn."""
    counts, expected = np.ravel(counts), np.ravel(probabilities) * np.sum(counts)
    if counts[expected == 0].any():
        return 0.0
    rare = expected < LEAST_EXPECTED
    cells = [*zip(counts[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() > 0:
        cells.append((counts[rare].sum(), expected[rare].sum()))
    return tail(sum((count - mean) ** 2 / mean for count, mean in cells), len(cells) - 1)


def tail(statistic: float, freedom: int) -> float:
    """P(X >= statistic), X chi-square with `freedom` degrees (Abramowitz and Stegun 1964, 26.4.4 and 26.4.5)."""
    half = statistic / 2
    if half == 0:
        return 1.0
    odd = freedom % 2
    first = erfc(sqrt(half)) if odd else 0.0
    powers = (i + odd / 2 for i in range((freedom - odd) // 2))
    return float(first + sum(exp(power * log(half) - half - lgamma(power + 1)) for power in powers))
