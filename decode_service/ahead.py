"""The step after the one that runs, scheduled while that runs: its tokens stay on the device. Torch-free.

Only where nothing but the tokens themselves is unknown: every sequence decodes the one output of its request, and what
follows depends on no token's value. An output that stops at a token found later has computed one row too many; what
that row drew is dropped, and the request's blocks are held until it is over (`Memory.hold`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from decode_service.config import SchedulerConfig
from decode_service.parts import Part
from decode_service.request import Share
from decode_service.stopping import max_output_tokens
from engine.batch import SampleSpec, Slice
from worker.stopping import suppressed

UNKNOWN = 0
"""In place of the token that the running step draws."""


@dataclass(slots=True, eq=False)
class AheadPart(Part):
    """One row behind a part of the running step, whose draw number `follows` it computes."""

    follows: int = 0

    def slice(self) -> Slice:
        """This row as the engine is told of it."""
        request, start = self.request, self.share.end - 1
        position = self.share.end - len(request.record.prompt)
        output = request.outputs[0]
        spec = SampleSpec(
            index=output.index,
            params=request.record.sampling,
            position=position,
            prompt=request.record.prompt,
            output=[*output.state.token_ids, UNKNOWN],
            suppress=suppressed(request.record, position, request.stops),
            logprobs=request.record.logprobs,
        )
        table = self.share.chain.table.blocks
        return Slice(request.key, [UNKNOWN], start, table, [spec], output=output.index, follows=self.follows)


def can_be_followed(plan: Sequence[Part]) -> bool:
    """True when each part of the running step decodes one output alone, and no later draw looks at earlier tokens."""
    return bool(plan) and all(_decodes_alone(part) for part in plan)


def _decodes_alone(part: Part) -> bool:
    params = part.request.record.sampling
    alone = len(part.request.outputs) == 1 and part.count == 1 and not part.drafts and len(part.drawing) == 1
    # Biases may name ids that the engine refuses, and then its draws are counted otherwise.
    return alone and not params.has_penalties and not params.logit_bias


def following_parts(plan: Sequence[Part], config: SchedulerConfig) -> list[AheadPart]:
    """The rows behind `plan`, with their blocks; none when there is no free block, or one would have to be copied.

    Outputs that end with the running step whatever it draws are left out.
    """
    parts: list[AheadPart] = []
    for follows, part in enumerate(plan):
        record, tokens = part.request.record, part.share.end + 1
        if tokens - len(record.prompt) >= max_output_tokens(record, config.max_context):
            continue
        if not part.share.chain.table.extend(tokens):
            return []
        share = Share(part.share.chain, part.share.output, tokens)
        parts.append(AheadPart(part.request, share, 1, follows=follows))
    return parts
