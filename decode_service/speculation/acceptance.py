"""How often drafts are right, measured: for a proposer, how sure it was, the place in the draft, and the output.

A draft is compared with what its output gets, whether it was verified or not: the tokens are the same either way. So
being wrong is known without being paid for. Rates are decayed means: what all outputs have seen is where an output's
own begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Final, NamedTuple

from decode_service.speculation.proposer import OutputKey

SHARED_MEMORY: Final = 1 - 1 / 128
OWN_MEMORY: Final = 1 - 1 / 16
"""What a rate keeps of its past at each new trial: 128 and 16 trials long."""
SHARED_WEIGHT: Final = 2.0
"""An output's own rate counts as much as what all have seen after this many trials."""
FIRST_GUESS: Final = 0.5
FIRST_WEIGHT: Final = 2.0


ANY: Final = -1


class Kind(NamedTuple):
    """What drafts have in common that are measured together."""

    proposer: str
    strength: int
    """As in `Draft.strength`; ANY for all drafts of the proposer."""


@dataclass(slots=True)
class Rate:
    """A decayed mean of trials."""

    hits: float = 0.0
    trials: float = 0.0

    def add(self, hit: bool, memory: float) -> None:
        """One more trial."""
        self.hits = self.hits * memory + hit
        self.trials = self.trials * memory + 1.0

    def mean(self, guess: float, weight: float) -> float:
        """The rate, where `guess` counts as much as `weight` trials."""
        return (self.hits + guess * weight) / (self.trials + weight)


@dataclass(slots=True)
class _Trial:
    """A draft that is being compared; `at` of its tokens were right so far."""

    kind: Kind
    tokens: Sequence[int]
    at: int = 0


@dataclass(slots=True)
class _Own:
    """One output's rates, and of each proposer the draft that is being compared."""

    rates: dict[tuple[Kind, int], Rate] = field(default_factory=dict)
    trials: dict[str, _Trial] = field(default_factory=dict)


class Acceptance:
    """The rates of a worker. One thread uses it."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._shared: dict[tuple[Kind, int], Rate] = {}
        self._own: dict[OutputKey, _Own] = {}

    def compare(self, key: OutputKey, kind: Kind, tokens: Sequence[int]) -> None:
        """`tokens` (not empty) may come next. A draft of that proposer that is being compared stays."""
        own = self._own.setdefault(key, _Own())
        own.trials.setdefault(kind.proposer, _Trial(kind, tokens))

    def saw(self, key: OutputKey, tokens: Sequence[int]) -> int:
        """The output got `tokens`. Returns how many tokens a draft was right with so far, the most of any."""
        own = self._own.get(key)
        if own is None or not own.trials:
            return 0
        right = 0
        for name, trial in list(own.trials.items()):
            if self._over(own, trial, tokens):
                del own.trials[name]
            right = max(right, trial.at)
        return right

    def _over(self, own: _Own, trial: _Trial, tokens: Sequence[int]) -> bool:
        for token in tokens:
            hit = trial.tokens[trial.at] == token
            for kind in (trial.kind, Kind(trial.kind.proposer, ANY)):
                at = kind, stretch(trial.at)
                self._shared.setdefault(at, Rate()).add(hit, SHARED_MEMORY)
                own.rates.setdefault(at, Rate()).add(hit, OWN_MEMORY)
            trial.at += hit
            if not hit or trial.at == len(trial.tokens):
                return True
        return False

    def survival(self, key: OutputKey, kind: Kind, count: int) -> list[float]:
        """For each of the first `count` tokens of a draft how likely it is that it and all before it are right."""
        own = self._own.get(key)
        rates = [self._rate(own, (kind, part)) for part in range(stretch(count - 1) + 1)]
        return list(accumulate((rates[stretch(place)] for place in range(count)), mul))

    def _rate(self, own: _Own | None, at: tuple[Kind, int]) -> float:
        shared = self._shared.get(at, _NONE).mean(FIRST_GUESS, FIRST_WEIGHT)
        mine = own.rates.get(at, _NONE) if own is not None else _NONE
        return mine.mean(shared, SHARED_WEIGHT)

    def finished(self, key: OutputKey) -> None:
        """The output has left."""
        self._own.pop(key, None)


_NONE: Final = Rate()


def stretch(place: int) -> int:
    """Places that are measured together: 0, 1, 2-3, 4-7, 8 and more."""
    return min(place.bit_length(), 4)
