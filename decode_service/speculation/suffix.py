"""Drafts from past outputs: what most often followed the last tokens in what this worker has written. Torch-free.

An output that asked for drafts is learned when it is finished, with the last tokens of its prompt, so that a draft can
begin with the first token of an answer. Outputs are shared within one cache scope only: each scope has a tree of its
own (`suffix_tree`). Memory is bounded by nodes and tokens over all scopes; the oldest output is forgotten first. Both
are done a few places a step, so that a long output doesn't hold up the batch.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from decode_service.speculation.ngram import strength_of
from decode_service.speculation.proposer import NOTHING, STRENGTHS, Ask, Draft, OutputKey
from decode_service.speculation.suffix_tree import NODE_BYTES, Place, SuffixTree

DEFAULT_BYTES: Final = 64 << 20
TOKEN_BYTES: Final = 4
DEPTH: Final = 32
"""Tokens that a tree sees together: a match and what follows it."""
MAX_MATCH: Final = 16
MIN_MATCH: Final = 2
LEAST_SHARE: Final = 0.1
"""A draft ends where its tokens together came in fewer of the places."""
PLACES_A_STEP: Final = 256
"""Places of texts learned or forgotten in one call of `propose`; each takes about 5 microseconds."""


@dataclass(slots=True)
class _Text:
    """One output with its prompt's end. Places before `added` are in the tree, but for those before `removed`."""

    number: int
    scope: str
    tokens: array[int]
    added: int = 0
    removed: int = 0


class PastOutputs:
    """What was written, by scope. A text: `learn` -> a few places a `work` -> forgotten when it is the oldest."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES, depth: int = DEPTH) -> None:
        """`max_bytes` bounds nodes and tokens together, within a few per cent."""
        self.max_nodes = max(16, max_bytes // (NODE_BYTES + TOKEN_BYTES))
        self._live: dict[int, array[int]] = {}
        self.tree = SuffixTree(depth, self._live)
        self._roots: dict[str, int] = {}
        self._texts: deque[_Text] = deque()
        self._waiting: deque[_Text] = deque()
        """The first may be in the tree in part."""
        self._waiting_tokens = 0
        self._tokens = 0
        """Of texts in the tree and of those that wait."""
        self._next = 0

    @property
    def texts(self) -> int:
        """Outputs that are known, in part at least."""
        return len(self._texts)

    @property
    def nbytes(self) -> int:
        """Bytes taken, about."""
        return self.tree.nodes * NODE_BYTES + self._tokens * TOKEN_BYTES

    def learn(self, scope: str, tokens: Sequence[int]) -> None:
        """Take over an output, its last tokens if it is very long; `work` puts it into the tree."""
        kept = array("I", tokens[-(self.max_nodes // 8) :])
        if len(kept) <= MIN_MATCH:
            return
        self._waiting.append(_Text(self._next, scope, kept))
        self._next += 1
        self._count(len(kept))
        while self._waiting_tokens > self.max_nodes // 4:
            # Never one that is in the tree in part: nothing behind it could be forgotten any more.
            at = 0 if self._waiting[0].added == 0 else 1
            self._count(-len(self._waiting[at].tokens))
            del self._waiting[at]

    def _count(self, tokens: int) -> None:
        """Texts that wait have so many tokens more."""
        self._waiting_tokens += tokens
        self._tokens += tokens

    def work(self, places: int) -> None:
        """Take up to `places` places: those of waiting texts into the tree, and old ones out of it to make room."""
        while places > 0 and self._waiting:
            text = self._waiting[0]
            if self._is_full() and self._forget_one():
                places -= 1
                continue
            if text.added == 0:
                self._live[text.number] = text.tokens
                self._texts.append(text)
            self.tree.add(self._root(text.scope), text.number, text.added)
            text.added += 1
            places -= 1
            if text.added == len(text.tokens):
                self._waiting.popleft()
                self._waiting_tokens -= len(text.tokens)

    def following(self, scope: str, tokens: Sequence[int], limit: int) -> tuple[list[int], int, float]:
        """What most often came after the longest end of `tokens` that is known: ids, tokens matched, the share of the
        places in which the first of them followed.
        """
        found: list[int] = []
        root, matched, first, share = self._roots.get(scope), 0, 0.0, 1.0
        while root is not None and len(found) < limit:
            length, place = self._longest(root, array("I", [*tokens[-MAX_MATCH:], *found][-MAX_MATCH:]))
            matched = matched or length
            went = 0
            while place is not None and len(found) < limit and (step := self.tree.likeliest(place)) is not None:
                token, one, place = step
                share *= one
                if share < LEAST_SHARE:
                    return found, matched, first
                first = first or share
                found.append(token)
                went += 1
            if length + went < self.tree.depth:
                break  # a text ended; else the tree did: look again, with what was drafted
        return found, matched, first

    def _longest(self, root: int, tokens: array[int]) -> tuple[int, Place | None]:
        """The longest end of `tokens` that occurs and goes on: its length, 0 for none, and its place."""
        low, high, length = MIN_MATCH, len(tokens), 0
        found: Place | None = None
        while low <= high:  # what a longer end has behind it, a shorter one has too
            middle = (low + high) // 2
            place = self.tree.walk(root, tokens[len(tokens) - middle :])
            if place is None:
                high = middle - 1
            else:
                low, length, found = middle + 1, middle, place
        return length, found

    def _root(self, scope: str) -> int:
        if scope not in self._roots:
            self._roots[scope] = self.tree.root()
        return self._roots[scope]

    def _is_full(self) -> bool:
        """No room for one place more: a leaf, a node between, maybe a root."""
        return self.tree.nodes + 3 > self.max_nodes or self._tokens > self.max_nodes

    def _forget_one(self) -> bool:
        """Take the next place of the oldest text out. False: there is none but that which is being added."""
        text = self._texts[0] if self._texts else None
        if text is None or text.removed == text.added:
            return False
        self.tree.remove(self._roots[text.scope], text.number, text.removed)
        text.removed += 1
        if self.tree.is_empty(self._roots[text.scope]):
            self.tree.drop_root(self._roots.pop(text.scope))
        if text.removed == len(text.tokens):
            self._texts.popleft()
            del self._live[text.number]
            self._tokens -= len(text.tokens)
        return True


@dataclass(slots=True)
class _Writing:
    """An output that is being written."""

    scope: str
    prompt_end: list[int]
    tokens: list[int] = field(default_factory=list)


class SuffixProposer:
    """A `Proposer`. Holds a copy of the tokens of every output that asked."""

    name = "suffix"
    cheap = True

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        """`max_bytes` bounds what is remembered of finished outputs."""
        self.past = PastOutputs(max_bytes)
        self._writing: dict[OutputKey, _Writing] = {}

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """See `Proposer`."""
        self.past.work(PLACES_A_STEP)
        return [self._one(ask) for ask in asks]

    def _one(self, ask: Ask) -> Draft:
        writing = self._writing.get(ask.key)
        if writing is None:
            writing = self._writing[ask.key] = _Writing(ask.scope, list(ask.prompt[-MAX_MATCH:]))
        writing.tokens += ask.output[len(writing.tokens) :]
        end = writing.tokens[-MAX_MATCH:]
        if len(end) < MAX_MATCH:
            end = [*writing.prompt_end, *end][-MAX_MATCH:]
        tokens, matched, share = self.past.following(ask.scope, end, ask.limit)
        if not tokens:
            return NOTHING
        return Draft(tokens, strength=min(strength_of(matched), int(share * STRENGTHS)))

    def observe(self, key: OutputKey, tokens: Sequence[int], accepted: int) -> None:
        """Nothing but the end of an output would be missed: what comes before, the next ask brings."""
        if (writing := self._writing.get(key)) is not None:
            writing.tokens += tokens

    def finished(self, key: OutputKey) -> None:
        """Learn what was written."""
        if (writing := self._writing.pop(key, None)) is not None:
            self.past.learn(writing.scope, [*writing.prompt_end, *writing.tokens])
