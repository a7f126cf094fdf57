"""What crosses from a scheduler to a runner and back: one `Batch` in, one `StepOutput` out. Plain data, torch-free.

Who fills what:
    scheduler   Batch, Slice, SampleSpec: which tokens are computed, into which blocks, and which rows are sampled, how.
    runner      StepOutput, SampledToken: one list of samples per slice, in the order of `Slice.samples`.
A scheduler may pass its own lists (`token_ids`, `block_table`, `output`); the runner reads them during `run` and keeps
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from tandem.errors import TandemError
from tandem.record import SamplingParams, TokenLogprobs


@dataclass(slots=True)  # not frozen: one is made for each sequence and step, in half the time
class SampleSpec:
    """One token to draw from the logits of one row of a slice."""

    index: int
    """Which of the request's n outputs; part of the noise's key."""
    params: SamplingParams
    position: int
    """Place of the drawn token within its output, from 0 (that is len(output)); part of the noise's key."""
    prompt: Sequence[int] = ()
    """Prompt ids, for the repetition penalty. Always filled (the fake runner checks them); no copy is made."""
    output: Sequence[int] = ()
    """Ids of this output so far, for all penalties."""
    suppress: tuple[int, ...] = ()
    """Ids that must not be drawn now, such as end-of-sequence ids before min_tokens."""
    logprobs: int | None = None
    """Alternatives to report; 0: the drawn token's own log probability only; None: nothing."""

    @property
    def takes_largest(self) -> bool:
        """True when the token is that of the largest logit and nothing else is wanted."""
        params = self.params
        if not params.greedy or self.logprobs is not None or self.suppress:
            return False
        return not params.logit_bias and not params.has_penalties


@dataclass(slots=True)  # not frozen: one is made for each sequence and step, in half the time
class Slice:
    """One sequence's share of a step: computes the tokens at positions start .. start+len(token_ids)-1 and caches their
    KV."""

    request_id: str
    token_ids: Sequence[int]
    """Ids to compute, at least one. In decode: the one token drawn last, maybe with drafts behind it."""
    start: int
    """Absolute position of the first; KV of 0 .. start-1 is in the cache already."""
    block_table: Sequence[int]
    """The sequence's blocks in order, covering at least start+len(token_ids) positions; those written are private."""
    samples: list[SampleSpec] = field(default_factory=list)
    """Drawn from the LAST row's logits, one token each (n first tokens come from one prompt row). Empty: no logits.
    With drafts: one for each of the last drafts + 1 rows, as if the drafts before it had been drawn."""
    drafts: int = 0
    """How many of `token_ids`, the last ones, are guesses at what will be drawn."""
    output: int | None = None
    """Which of the request's n outputs the sequence is; None: it is the prompt of several."""
    follows: int | None = None
    """The last of `token_ids` is a placeholder for what this draw of the step launched before brings (counted over all
    its draws): that step need not be collected yet. Only where the runner `overlaps`."""

    @property
    def end(self) -> int:
        """Tokens of the sequence in the cache after this step, drafts included."""
        return self.start + len(self.token_ids)

    @property
    def num_known(self) -> int:
        """Tokens that are no drafts."""
        return len(self.token_ids) - self.drafts

    @property
    def num_sampled_rows(self) -> int:
        """Rows, the last ones, that something is drawn from."""
        return self.drafts + 1 if self.samples else 0

    def standing(self, drawn: Sequence[int]) -> int:
        """How many of the tokens drawn with drafts stand: all up to the first that isn't the draft of its place, which
        stands too. Each later one was drawn behind a token that isn't there.
        """
        for place, draft in enumerate(self.token_ids[self.num_known :]):
            if drawn[place] != draft:
                return place + 1
        return self.drafts + 1


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. `copies` (source block, destination block) happen in order, before anything is computed."""

    slices: list[Slice]
    copies: list[tuple[int, int]] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)
    """Blocks that transfers have filled in the host's memory since the last step; on a GPU they are brought there first
    of all. Where the cache is the host's there is nothing to do."""

    @property
    def num_tokens(self) -> int:
        """Rows of the forward pass."""
        return sum(len(item.token_ids) for item in self.slices)


@dataclass(slots=True)  # not frozen, as above
class SampledToken:
    """One drawn token; `logprobs` when the spec asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step drew. `samples[i][j]` answers `batch.slices[i].samples[j]`; unsampled slices have an empty list.

    Of a slice with drafts only what stands is there (`Slice.standing`): 1 to drafts + 1 tokens.
    """

    samples: list[list[SampledToken]]
    errors: dict[int, TandemError] = field(default_factory=dict)
    """Slice number -> why it has no samples (NaN logits). The other slices of the step are sound; end only this
    request."""


class Launched(Protocol):
    """A step that was launched and may still run."""

    def collect(self) -> StepOutput:
        """Wait for it. Once."""
        ...


class StepRunner(Protocol):
    """Runs batches on one device. Stateless about sequences; called from one thread."""

    def run(self, batch: Batch) -> StepOutput:
        """Copies, computes and draws. Raises InternalError for a batch that breaks its contract."""
        ...

    def warm_up(self) -> None:
        """Pays for lazy initialisation before the first request."""
        ...


@runtime_checkable
class OverlappingRunner(Protocol):
    """A `StepRunner` whose steps can be launched and collected apart."""

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched before the last one is collected, and take tokens from it
        (`Slice.follows`)."""
        ...

    def launch(self, batch: Batch) -> Launched:
        """The first half of `run`: raises what that does. Steps are collected in order."""
        ...
