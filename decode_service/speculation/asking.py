"""Asks proposers for drafts: cheap ones always, costly ones where that is expected to pay. See `speculator`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from decode_service.speculation import policy
from decode_service.speculation.acceptance import ANY, Acceptance, Kind
from decode_service.speculation.costs import Cost
from decode_service.speculation.counts import Counts
from decode_service.speculation.proposer import NOTHING, Ask, Draft, OutputKey, Proposer, chain_of
from tandem.service.logging import get_logger

_log = get_logger(__name__)
MEMORY: Final = 0.9
PROBE_STEPS: Final = 128
"""A costly proposer that doesn't pay is asked once in so many steps all the same."""
PROBE_TOKENS: Final = 3
CATCH_UP_STEPS: Final = 8
"""Steps after a probe that brought nothing, since the proposer has to catch up with the output, to the next."""
LONGEST_BREAK: Final = 10
"""A proposer that fails is left alone for a step, after the next failure for two, at last for 2 ** this."""


@dataclass(slots=True)
class Candidate:
    """A draft that could be verified; `place` is that of its ask among those of the step."""

    place: int
    key: OutputKey
    kind: Kind
    tokens: list[int]
    chances: list[float]
    """How likely each token is kept."""

    @property
    def expected(self) -> float:
        """Tokens that it is expected to bring."""
        return sum(self.chances)


class Asker:
    """One proposer with what asking it costs."""

    def __init__(
        self, proposer: Proposer, acceptance: Acceptance, vocab_size: int, margin: float, *, always: bool = False
    ) -> None:
        """`acceptance` is shared with the other proposers. `always`: ask also where that isn't expected to pay."""
        self.proposer = proposer
        self._always = always or proposer.cheap
        self.counts = Counts()
        self._acceptance = acceptance
        self._vocab_size = vocab_size
        self._margin = margin
        self._round = 0.0
        """Seconds of one token more for every output that is asked for; 0 until measured."""
        self._idle = 0
        self._probing = False
        self._failures = 0
        """In a row."""
        self._break = 0
        """Steps in which it isn't asked, since it failed."""

    def candidates(self, asks: Sequence[tuple[int, Ask]], outputs: int, cost: Cost) -> list[Candidate]:
        """Drafts for `asks`, each with its place."""
        if self._break:
            self._break -= 1
            return []
        if not self._always:
            asks = self._worth(asks, outputs, cost)
        if not asks:
            return []
        drafts = self._propose([ask for _, ask in asks])
        made = [self._candidate(place, ask, draft) for (place, ask), draft in zip(asks, drafts, strict=True)]
        found = [candidate for candidate in made if candidate is not None]
        if self._probing and not found:
            self._idle = PROBE_STEPS - CATCH_UP_STEPS
        return found

    def _worth(self, asks: Sequence[tuple[int, Ask]], outputs: int, cost: Cost) -> Sequence[tuple[int, Ask]]:
        """Those whose drafts are expected to pay for their making too, each with the limit that pays best."""
        kind = Kind(self.proposer.name, ANY)  # how sure it will be isn't known before
        chances = [self._acceptance.survival(ask.key, kind, ask.limit) for _, ask in asks]

        def with_making(drafts: int) -> float:
            return cost(drafts) + self._round * -(-drafts // len(asks))

        wanted = policy.lengths(chances, outputs, with_making, self._margin) if asks else []
        self._probing = False
        if any(wanted):
            self._idle = 0
            return [(at, _limited(ask, most)) for (at, ask), most in zip(asks, wanted, strict=True) if most]
        self._idle += bool(asks)
        if self._idle < PROBE_STEPS:
            return []
        self._idle, self._probing = 0, True
        return [(place, _limited(ask, PROBE_TOKENS)) for place, ask in asks[:1]]

    def _propose(self, asks: list[Ask]) -> Sequence[Draft]:
        began = time.perf_counter()
        try:
            drafts = self.proposer.propose(asks)
            self._failures = 0
        except Exception as exc:  # drafts are a hint: without them the step goes on
            self._break = 1 << min(self._failures, LONGEST_BREAK)
            self._failures += 1
            _log.error("a proposer failed", proposer=self.proposer.name, steps_without=self._break, exc_info=exc)
            drafts = [NOTHING] * len(asks)
        seconds = time.perf_counter() - began
        self.counts.seconds += seconds
        longest = max((len(draft.token_ids) for draft in drafts), default=0)
        if longest:
            one = seconds / longest
            self._round = MEMORY * self._round + (1 - MEMORY) * one if self._round else one
        return drafts

    def _candidate(self, place: int, ask: Ask, draft: Draft) -> Candidate | None:
        """A draft as far as it can be verified; from here on it is compared with what comes."""
        tokens = chain_of(draft)[: ask.limit]
        bad = next((i for i, token in enumerate(tokens) if not 0 <= token < self._vocab_size), len(tokens))
        del tokens[bad:]
        if not tokens:
            return None
        kind = Kind(self.proposer.name, draft.strength)
        self._acceptance.compare(ask.key, kind, tokens)
        return Candidate(place, ask.key, kind, tokens, self._acceptance.survival(ask.key, kind, len(tokens)))


def _limited(ask: Ask, most: int) -> Ask:
    return replace(ask, limit=min(ask.limit, most))
