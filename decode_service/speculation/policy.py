"""How many drafts of each output a step verifies: as many as bring the most tokens a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from decode_service.speculation.costs import Cost

UNLIKELY: Final = 0.03
"""A draft less likely than this is not looked at: no row costs less."""


def lengths(chances: Sequence[Sequence[float]], outputs: int, cost: Cost, margin: float) -> list[int]:
    """Drafts to verify of each candidate, 0 for all when none pays.

    `chances[i][j]`: how likely draft j of candidate i is kept, not rising with j. `outputs` get a token in any case.
    The step must bring `margin` times the tokens a second of one without drafts.
    """
    likely = ((chance, i) for i, row in enumerate(chances) for chance in row if chance >= UNLIKELY)
    ranked = sorted(likely, key=lambda item: -item[0])
    tokens, best, wanted = float(outputs), outputs / cost(0) * margin, 0
    for count, (chance, _) in enumerate(ranked, 1):
        tokens += chance
        rate = tokens / cost(count)
        if rate > best:
            best, wanted = rate, count
    chosen = [0] * len(chances)
    for _, i in ranked[:wanted]:
        chosen[i] += 1
    return chosen
