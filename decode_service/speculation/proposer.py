"""What proposes drafts: the tokens that an output may go on with, to be verified in one step. Torch-free.

Life cycle of a proposer: made at the worker's start -> for each step `propose`, once for all outputs that want drafts
-> `observe` after each step for every output that got tokens -> `finished` once for each output, whatever ended it. All
calls come from the engine's thread, between two steps, and hold up the batch: a proposer bounds what it does in one.

A proposer's state is a hint. It never travels with a request, may be dropped at any time, and being wrong costs only
time. It is counted against the proposer how long `propose` takes and how few of its drafts are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tandem.record import SamplingParams

STRENGTHS = 8
"""Classes of `Draft.strength`."""


class OutputKey(NamedTuple):
    """One output aboard: `request` is the scheduler's key, new for each admission; `output` which of its n."""

    request: str
    output: int


@dataclass(frozen=True, slots=True)
class Ask:
    """One output that wants drafts now. The lists are the scheduler's own: valid during the call, not to be kept."""

    key: OutputKey
    prompt: Sequence[int]
    output: Sequence[int]
    """Every token so far, at least one. The drafts follow the last."""
    limit: int
    """Most tokens of a draft, at least 1."""
    params: SamplingParams
    """With `kernels.sampling.noise_key(seed, key.output, len(output) + i)` the noise that draft token i is drawn with:
    a proposer with a model may draw with it too, and then agrees more often."""
    scope: str = ""
    """The request's cache scope. What is learned from one output may be shown only to outputs of the same scope."""
    blocks: Sequence[int] = ()
    """Where the target has cached every token but the last, in order; for reading only."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What may come next; nothing when there are no tokens."""

    token_ids: Sequence[int] = ()
    """At most `Ask.limit`; ids outside the vocabulary end the draft."""
    parents: Sequence[int] = ()
    """Empty: a chain, each token follows the one before. Else, for a tree, the place of the token that each follows,
    -1 for the last known one; places rise, likelier children come first, so that the first path is the best chain."""
    strength: int = 0
    """How sure the proposer is, 0 to STRENGTHS - 1 (the length of a match, the model's own probability): acceptance is
    measured for each class alone, so what these mean is the proposer's own affair."""


NOTHING = Draft()


class Proposer(Protocol):
    """See the module's life cycle."""

    name: str
    """What flags, requests and metrics call it."""
    cheap: bool
    """True when `propose` costs next to nothing beside a step, so that it is asked at every step and its acceptance is
    measured even while no draft is verified."""

    def propose(self, asks: Sequence[Ask]) -> Sequence[Draft]:
        """A draft for each of `asks`, in order. Never raises for what a request says; an error is
        logged, and the proposer is left alone for a while, the longer the more often it fails in a row."""
        ...

    def observe(self, key: OutputKey, tokens: Sequence[int], accepted: int) -> None:
        """A step gave this output `tokens`; the first `accepted` of them were drafts. Also called for outputs that were
        not asked for."""
        ...

    def finished(self, key: OutputKey) -> None:
        """The output needs no more tokens or has left; forget it. Unknown keys are ignored."""
        ...


def chain_of(draft: Draft) -> list[int]:
    """The first path of a draft from its root: the best chain of a tree, all of a chain."""
    if not draft.parents:
        return list(draft.token_ids)
    path: list[int] = []
    last = -1
    for place, (token, parent) in enumerate(zip(draft.token_ids, draft.parents, strict=True)):
        if parent == last:
            path.append(token)
            last = place
    return path
