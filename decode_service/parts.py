"""What one chain computes in a step, and how the engine is told of it. Torch-free.

Life cycle of a `Part`: planned by the scheduler, with its blocks -> maybe given drafts -> `slice` for the engine ->
`take` of what the engine drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from decode_service import adoption
from decode_service.config import SchedulerConfig
from decode_service.request import Output, Request, Share
from decode_service.stopping import max_output_tokens
from engine.batch import SampledToken, SampleSpec, Slice
from worker.stopping import suppressed


@dataclass(slots=True, eq=False)
class Part:
    """`count` tokens of one chain that are known, from its `computed` on, and `drafts` behind them."""

    request: Request
    share: Share
    count: int
    drafts: list[int] = field(default_factory=list)

    @property
    def owner(self) -> Output | None:
        """The output whose tokens the chain ends with; None while several share it."""
        live = self.request.live
        return live[0] if self.share.output is None and len(live) == 1 else self.share.output

    @property
    def drawing(self) -> list[Output]:
        """The outputs that get a token after the last known one, in a step that comes so far.

        A trunk draws only for outputs without tokens, unless it has one.
        """
        if self.share.chain.computed + self.count < self.share.end:
            return []
        live = self.request.live
        drawing = [self.share.output] if self.share.output is not None else live
        if len(drawing) > 1:
            drawing = [output for output in drawing if not output.state.token_ids]
        return drawing

    def draft_limit(self, config: SchedulerConfig) -> int:
        """Most drafts that can be of use: the output ends with the token that is drawn after the last of them.

        0 unless one output decodes alone.
        """
        drawing = self.drawing
        if self.count != 1 or len(drawing) != 1 or not drawing[0].state.token_ids:
            return 0
        record = self.request.record
        return max_output_tokens(record, config.max_context) - len(drawing[0].state.token_ids) - 1

    def slice(self) -> Slice:
        """This part as the engine is told of it."""
        share, request = self.share, self.request
        start = share.chain.computed
        return Slice(
            request_id=request.key,
            token_ids=[*request.tokens(start, start + self.count, share.output), *self.drafts],
            start=start,
            block_table=share.chain.table.blocks,
            samples=self._samples(),
            drafts=len(self.drafts),
            output=self._output(),
        )

    def _output(self) -> int | None:
        """The output that this chain is of alone."""
        if self.share.output is not None:
            return self.share.output.index
        live = self.request.live
        return live[0].index if len(live) == 1 else None

    def _samples(self) -> list[SampleSpec]:
        drawing, drafts = self.drawing, self.drafts
        specs = [self._spec(output, output.state.token_ids) for output in drawing]
        for end in range(1, len(drafts) + 1):
            specs.append(self._spec(drawing[0], [*drawing[0].state.token_ids, *drafts[:end]]))
        return specs

    def _spec(self, output: Output, tokens: list[int]) -> SampleSpec:
        record = self.request.record
        return SampleSpec(
            index=output.index,
            params=record.sampling,
            position=len(tokens),
            prompt=record.prompt,
            output=tokens,
            suppress=suppressed(record, len(tokens), self.request.stops),
            logprobs=record.logprobs,
        )

    def take(self, part: Slice, drawn: Sequence[SampledToken], config: SchedulerConfig) -> int:
        """The step is over: adopt what was drawn up to where an output ends, and say how much of the chain is computed.

        Slots of drafts that don't stand are given back; what lies in them is written over. Returns the new tokens.
        """
        chain = self.share.chain
        if not self.drafts:
            chain.computed += self.count
            specs = zip(part.samples, drawn, strict=True)
            return sum(self._adopt(self.request.outputs[spec.index], [sampled], config) for spec, sampled in specs)
        taken = self._adopt(self.drawing[0], drawn, config)
        chain.computed += min(len(drawn), taken + 1)
        chain.table.trim(chain.computed)
        return taken

    def _adopt(self, output: Output, drawn: Sequence[SampledToken], config: SchedulerConfig) -> int:
        before = len(output.state.token_ids)
        tokens = [sampled.token_id for sampled in drawn]
        logprobs = [sampled.logprobs for sampled in drawn if sampled.logprobs is not None]
        adoption.adopt(self.request, output, tokens, logprobs, config, before)
        return len(output.state.token_ids) - before
