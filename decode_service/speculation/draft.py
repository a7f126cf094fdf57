"""Drafts by a model: a smaller one of the same vocabulary, or the target itself with layers skipped. Torch-free.

A `propose` is up to `limit` steps of the draft model, each one batch over all outputs that ask. The first also computes
what the model has not seen yet: the few tokens that the last step brought, or a chunk of a prompt. Prompts are computed
a bounded number of tokens a call, and there are no drafts for an output before that is over, so nobody waits for it.

Draft tokens are drawn as the target draws: same parameters, same noise. Where the models agree, so do the tokens, at
any temperature (coupling by a shared Gumbel noise). A draft ends before a token that its model itself doubts.

What the model has computed behind the last token that turned out true is overwritten: nothing is copied or moved back.
Where its KV lies is the business of `draft_memory`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from decode_service.speculation.draft_memory import DraftMemory, DraftSequence
from decode_service.speculation.proposer import NOTHING, STRENGTHS, Ask, Draft, OutputKey
from engine.batch import Batch, SampledToken, SampleSpec, Slice, StepRunner

CATCH_UP_TOKENS: Final = 64
"""Tokens of prompts, or of outputs that have not asked for long, that one call computes for all outputs together."""
LEAST_PROBABILITY: Final = 0.3
"""A draft ends before a token to which its model gives less, unless it is the first, which says how good drafts are."""


@dataclass(slots=True)
class _Work:
    """One ask in a call."""

    ask: Ask
    sequence: DraftSequence
    length: int
    """Tokens known: prompt and output."""
    drafts: list[int] = field(default_factory=list)
    strength: int = 0
    doubted: bool = False

    @property
    def pending(self) -> int:
        """Known tokens that are not computed."""
        return self.length - self.sequence.first - len(self.sequence.tokens)

    @property
    def wants_more(self) -> bool:
        """True while a further token should be drafted."""
        return not self.doubted and len(self.drafts) < self.ask.limit

    def known(self, start: int, end: int) -> list[int]:
        """Tokens start .. end-1 of prompt and output."""
        prompt, output, size = self.ask.prompt, self.ask.output, len(self.ask.prompt)
        return [*prompt[start:end], *output[max(0, start - size) : max(0, end - size)]]

    def spec(self) -> SampleSpec:
        """The next draft token: drawn as the target will draw at this place."""
        ask = self.ask
        return SampleSpec(
            index=ask.key.output,
            params=ask.params,
            position=len(ask.output) + len(self.drafts),
            prompt=ask.prompt,
            output=[*ask.output, *self.drafts] if self.drafts else ask.output,
            logprobs=0,
        )

    def take(self, drawn: SampledToken, least: float) -> None:
        """One more draft token, or the end of the draft."""
        probability = math.exp(drawn.logprobs.logprob) if drawn.logprobs is not None else 1.0
        self.doubted = probability < least
        if self.doubted and self.drafts:
            return
        if not self.drafts:
            self.strength = min(int(probability * STRENGTHS), STRENGTHS - 1)
        self.drafts.append(drawn.token_id)


@dataclass(slots=True)
class _Part:
    """A slice of one step: the tokens that it computes, and whether it draws."""

    work: _Work
    tokens: list[int]
    draws: bool


class DraftProposer:
    """A `Proposer` over a runner of its own and the memory that this runner's blocks are in."""

    cheap = False

    def __init__(
        self,
        name: str,
        runner: StepRunner,
        memory: DraftMemory,
        max_context: int,
        *,
        catch_up_tokens: int = CATCH_UP_TOKENS,
        least_probability: float = LEAST_PROBABILITY,
    ) -> None:
        """`max_context` is the draft model's, in tokens: outputs beyond it get no drafts."""
        self.name = name
        self._runner = runner
        self._memory = memory
        self._max_context = max_context
        self._catch_up_tokens = catch_up_tokens
        self._least = least_probability

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """See `Proposer`. What the runner raises goes on, once the outputs' KV, which is in doubt, is dropped."""
        self._memory.begin(asks)
        try:
            works = self._draft(asks)
        except Exception:
            for ask in asks:
                self._memory.drop(ask.key)
            raise
        finally:
            self._memory.end()
        return [Draft(work.drafts, strength=work.strength) if work and work.drafts else NOTHING for work in works]

    def observe(self, key: OutputKey, tokens: Sequence[int], accepted: int) -> None:
        """Nothing: the next ask brings the tokens."""

    def finished(self, key: OutputKey) -> None:
        """See `Proposer`."""
        self._memory.forget(key)

    # -- inside

    def _draft(self, asks: Sequence[Ask]) -> list[_Work | None]:
        works = [self._work(ask) for ask in asks]
        copies: list[tuple[int, int]] = []
        parts = self._first_parts([work for work in works if work is not None], copies)
        while parts:
            self._run(parts, copies)
            copies = []
            parts = [
                _Part(part.work, part.work.drafts[-1:], True)
                for part in parts
                if part.draws and part.work.wants_more and self._grow(part.work, 1, copies)
            ]
        return works

    def _work(self, ask: Ask) -> _Work | None:
        sequence = self._memory.of(ask)
        if sequence is None:
            return None
        work = _Work(ask, sequence, len(ask.prompt) + len(ask.output))
        tokens, first = sequence.tokens, sequence.first
        start = min(sequence.true, work.length - first)
        for place, token in enumerate(work.known(first + start, first + len(tokens)), start):
            if tokens[place] != token:
                del tokens[place:]
                break
        del tokens[work.length - 1 - first :]  # the last is computed always, to draw from
        sequence.true = len(tokens)
        return work

    def _first_parts(self, works: Sequence[_Work], copies: list[tuple[int, int]]) -> list[_Part]:
        """What is not computed yet: in full where it is little, else in chunks, the first that ask first."""
        budget = self._catch_up_tokens
        parts: list[_Part] = []
        for work in works:
            near = work.pending <= work.ask.limit + 1
            count = work.pending if near else min(work.pending, budget)
            if count == 0 or not self._grow(work, count, copies):
                continue
            budget -= 0 if near else count
            start = work.sequence.first + len(work.sequence.tokens)
            parts.append(_Part(work, work.known(start, start + count), count == work.pending))
        return parts

    def _grow(self, work: _Work, count: int, copies: list[tuple[int, int]]) -> bool:
        """Room for `count` tokens more; False when there is none, or the model's context is full."""
        end = len(work.sequence.tokens) + count
        if work.sequence.first + end > self._max_context:
            return False
        grown = self._memory.grow(work.sequence, end)
        copies.extend(grown or ())
        return grown is not None

    def _run(self, parts: Sequence[_Part], copies: list[tuple[int, int]]) -> None:
        output = self._runner.run(Batch([self._slice(part) for part in parts], copies))
        for number, part in enumerate(parts):
            work, sequence = part.work, part.work.sequence
            if number in output.errors:  # not a number, say: no more drafts from this KV
                self._memory.drop(work.ask.key)
                work.doubted = True
                continue
            sequence.tokens += part.tokens
            if not work.drafts:
                sequence.true = len(sequence.tokens)
                self._memory.register(sequence, len(work.ask.prompt))
            if part.draws:
                work.take(output.samples[number][0], self._least)

    def _slice(self, part: _Part) -> Slice:
        sequence = part.work.sequence
        return Slice(
            request_id=part.work.ask.key.request,
            token_ids=part.tokens,
            start=len(sequence.tokens),
            block_table=sequence.table.blocks,
            samples=[part.work.spec()] if part.draws else [],
            output=part.work.ask.key.output,
        )
