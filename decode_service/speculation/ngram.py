"""Prompt lookup: what followed the last tokens when they came before, in prompt or output (Saxena 2023). Torch-free.

Each output has an index from pairs of neighbouring tokens to the places where they ended, newest first, as in LZ77's
hash chains. The draft follows the place whose match with the end of the output is longest; where the last pair is new,
the newest place of the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from decode_service.speculation.proposer import NOTHING, STRENGTHS, Ask, Draft, OutputKey

MAX_PLACES: Final = 16
"""Places of one pair that are compared, the newest first."""
MAX_MATCH: Final = 32
"""Tokens after which a match needs no comparing: it is as strong as any."""
MAX_INDEXED: Final = 8192
"""Tokens that one call indexes of one output, so that a long prompt doesn't hold up the batch; drafts come after."""
_NEVER: Final = -1


@dataclass(slots=True)
class _History:
    """One output's tokens with its prompt, indexed up to the last but one: the last pair is what is looked for."""

    tokens: list[int] = field(default_factory=list)
    newest: dict[tuple[int, int], int] = field(default_factory=dict)
    """Where a pair ended last."""
    seen: dict[int, int] = field(default_factory=dict)
    """Where a token was last."""
    older: list[int] = field(default_factory=list)
    """For each place where the same pair ended before, or _NEVER."""

    def catch_up(self, ask: Ask) -> bool:
        """Take over what is new; True when everything is indexed."""
        prompt, have = len(ask.prompt), len(self.tokens)
        if have < prompt:
            self.tokens += islice(ask.prompt, have, None)
            have = prompt
        self.tokens += ask.output[have - prompt :]
        self._index(min(len(self.tokens) - 1, len(self.older) + MAX_INDEXED))
        return len(self.older) >= len(self.tokens) - 1

    def _index(self, end: int) -> None:
        tokens, newest, older = self.tokens, self.newest, self.older
        if not older and end > 0:
            older.append(_NEVER)
            self.seen[tokens[0]] = 0
        for place in range(len(older), end):
            pair = (tokens[place - 1], tokens[place])
            older.append(newest.get(pair, _NEVER))
            newest[pair] = place
            self.seen[tokens[place]] = place

    def longest(self) -> tuple[int, int]:
        """Where the longest match of the tokens' end ends, and its length; the newest of equals. Length 0: none."""
        tokens = self.tokens
        last = len(tokens) - 1
        best, length = _NEVER, 0
        place = self.newest.get((tokens[last - 1], tokens[last]), _NEVER) if last else _NEVER
        for _ in range(MAX_PLACES):
            if place == _NEVER or length >= MAX_MATCH:
                break
            matched = self._matched(place, last)
            if matched > length:
                best, length = place, matched
            place = self.older[place]
        if length == 0 and (single := self.seen.get(tokens[last], _NEVER)) != _NEVER:
            return single, 1
        return best, length

    def _matched(self, place: int, last: int) -> int:
        """Tokens that agree backwards from `place` and from `last`; the pair itself does."""
        tokens, count = self.tokens, 2
        while count < MAX_MATCH and count <= place and tokens[place - count] == tokens[last - count]:
            count += 1
        return count


class NgramProposer:
    """A `Proposer`. Holds a copy of the tokens of every output that asked, with 3 to 4 words a token."""

    name = "ngram"
    cheap = True

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._histories: dict[OutputKey, _History] = {}

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """See `Proposer`."""
        return [self._one(ask) for ask in asks]

    def _one(self, ask: Ask) -> Draft:
        history = self._histories.setdefault(ask.key, _History())
        if not history.catch_up(ask):
            return NOTHING
        place, length = history.longest()
        if length == 0:
            return NOTHING
        return Draft(_continuation(history.tokens, place + 1, ask.limit), strength=strength_of(length))

    def observe(self, key: OutputKey, tokens: Sequence[int], accepted: int) -> None:
        """Nothing: the next ask brings the tokens."""

    def finished(self, key: OutputKey) -> None:
        """See `Proposer`."""
        self._histories.pop(key, None)


def _continuation(tokens: list[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on; past the end those that repeat with the same period go on."""
    found = tokens[start : start + count]
    period = len(tokens) - start
    while len(found) < count:
        found.append(found[-period])
    return found


def strength_of(length: int) -> int:
    """The class of a match of `length` tokens: 1, 2, 3, 4, 5-7, 8-12, 13-23, 24 and more."""
    bounds = (2, 3, 4, 5, 8, 13, 24)
    return min(sum(length >= bound for bound in bounds), STRENGTHS - 1)
