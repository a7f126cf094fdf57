"""How tokens come into a request: drawn by a step, committed by a prefill worker, or forced since the client has them.

Stateless functions over a `Request`. A token that is there is never replaced. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence

from decode_service import stopping
from decode_service.config import SchedulerConfig
from decode_service.events import Event, Finished, Tokens
from decode_service.request import Output, Request
from tandem.errors import InvalidRequestError
from tandem.record import Record, TokenDelta, TokenLogprobs
from worker.admission import check_tokens


def adopt(
    request: Request,
    output: Output,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    config: SchedulerConfig,
    position: int = 0,
) -> None:
    """Take over what `tokens` has beyond the output's own, up to where the output ends.

    `position` is the place of the first in the output, at most one behind its last; `logprobs` are parallel to
    `tokens`, or empty.
    """
    state = output.state
    for place in range(len(state.token_ids) - position, len(tokens)):
        if not output.live:
            return
        state.token_ids.append(tokens[place])
        if place < len(logprobs):
            state.logprobs.append(logprobs[place])
        state.finish_reason = stopping.finish_reason(request.record, state, request.stops, config.max_context)


def adopt_record(request: Request, record: Record, config: SchedulerConfig) -> None:
    """Take over the tokens of a committed record. Raises InvalidRequestError, and then has changed nothing."""
    if len(record.outputs) != len(request.outputs):
        raise InvalidRequestError("the committed record has another number of outputs", field="record.outputs")
    for committed in record.outputs:
        check_tokens(committed.token_ids, config, "record.outputs")
    for output, committed in zip(request.outputs, record.outputs, strict=True):
        adopt(request, output, committed.token_ids, committed.logprobs, config)


def force(request: Request, emitted: Sequence[TokenDelta], config: SchedulerConfig) -> None:
    """Keep tokens that the client has. They are not streamed again. Raises InvalidRequestError."""
    for delta in emitted:
        if delta.index >= len(request.outputs):
            raise InvalidRequestError(f"no output {delta.index}", field="retarget.emitted")
        output = request.outputs[delta.index]
        known = output.state
        if delta.position > len(known.token_ids):
            raise InvalidRequestError(f"tokens before position {delta.position} are missing", field="retarget.emitted")
        check_tokens(delta.token_ids, config, "retarget.emitted")
        adopt(request, output, delta.token_ids, delta.logprobs, config, delta.position)
        end = delta.position + len(delta.token_ids)
        output.streamed = max(output.streamed, min(end, len(known.token_ids)))


def check_ends(request: Request, config: SchedulerConfig) -> None:
    """Finish outputs whose tokens end them already, as in a record whose worker died before it could say so."""
    for output in request.live:
        output.state.finish_reason = stopping.finish_reason(
            request.record, output.state, request.stops, config.max_context
        )


def news(request: Request) -> list[Event]:
    """What the gateway doesn't know yet: tokens, then ends.

    Blocks of ended outputs are freed, unless they are the trunk's.
    """
    deltas: list[TokenDelta] = []
    ends: list[Event] = []
    for output in request.outputs:
        if output.announced:
            continue
        state, start = output.state, output.streamed
        if start < len(state.token_ids):
            tokens, logprobs = state.token_ids[start:], state.logprobs[start:]
            deltas.append(TokenDelta(output.index, start, tokens, logprobs, output.drafted, output.accepted))
            output.streamed = len(state.token_ids)
            output.drafted = output.accepted = 0
        if state.finish_reason is not None:
            output.announced = True
            ends.append(Finished(request.key, output.index, state.finish_reason, len(state.token_ids)))
            if output.chain is not None:
                output.chain.table.free()
                output.chain = None
    return [Tokens(request.key, deltas), *ends] if deltas else ends
