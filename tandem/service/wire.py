"""Protobuf messages to plain data and back, for what more than one service speaks of. Used by servicers and stubs'
callers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tandem.errors import InvalidRequestError
from tandem.kv_layout import KvLayout
from tandem.record import (
    FinishReason,
    OutputState,
    Record,
    SamplingParams,
    Speculation,
    StopRules,
    TokenDelta,
    TokenLogprobs,
)
from tandem.v1 import types_pb2 as pb

_FINISH_TO_PB = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}
_FINISH_FROM_PB = {value: key for key, value in _FINISH_TO_PB.items()}


def finish_reason_to_pb(reason: FinishReason | None) -> pb.FinishReason.ValueType:
    """None becomes UNSPECIFIED."""
    return pb.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_TO_PB[reason]


def finish_reason_from_pb(reason: pb.FinishReason.ValueType) -> FinishReason | None:
    """UNSPECIFIED, and values of a later version, become None."""
    return _FINISH_FROM_PB.get(reason)


def logprobs_to_pb(logprobs: Sequence[TokenLogprobs]) -> pb.TokenLogprobs | None:
    """Packs per-token log probabilities; None for an empty sequence. All must have one number of alternatives."""
    if not logprobs:
        return None
    return pb.TokenLogprobs(
        token_logprobs=[item.logprob for item in logprobs],
        top_count=len(logprobs[0].top_token_ids),
        top_token_ids=[token for item in logprobs for token in item.top_token_ids],
        top_logprobs=[value for item in logprobs for value in item.top_logprobs],
    )


def logprobs_from_pb(message: pb.TokenLogprobs) -> list[TokenLogprobs]:
    """Unpacks; raises InvalidRequestError when the arrays' lengths disagree."""
    count, width = len(message.token_logprobs), message.top_count
    if len(message.top_token_ids) != count * width or len(message.top_logprobs) != count * width:
        raise InvalidRequestError(
            f"top_token_ids and top_logprobs must hold token_logprobs x top_count = {count * width} entries, "
            f"got {len(message.top_token_ids)} and {len(message.top_logprobs)}",
            field="logprobs",
        )
    return [
        TokenLogprobs(
            logprob=message.token_logprobs[i],
            top_token_ids=tuple(message.top_token_ids[i * width : (i + 1) * width]),
            top_logprobs=tuple(message.top_logprobs[i * width : (i + 1) * width]),
        )
        for i in range(count)
    ]


def delta_to_pb(delta: TokenDelta) -> pb.TokenDelta:
    """One output's consecutive tokens."""
    message = pb.TokenDelta()
    fill_delta(message, delta)
    return message


def fill_delta(message: pb.TokenDelta, delta: TokenDelta) -> None:
    """The same into an empty `message`, such as a new part of another: one that is made alone would be copied there."""
    message.index, message.position = delta.index, delta.position
    message.token_ids.extend(delta.token_ids)
    if (logprobs := logprobs_to_pb(delta.logprobs)) is not None:
        message.logprobs.CopyFrom(logprobs)
    if delta.drafted:
        message.drafted, message.accepted = delta.drafted, delta.accepted


def delta_from_pb(message: pb.TokenDelta) -> TokenDelta:
    """Inverse of `delta_to_pb`."""
    return TokenDelta(
        index=message.index,
        position=message.position,
        token_ids=list(message.token_ids),
        # Asked first: a look into an absent message makes one, for every token.
        logprobs=logprobs_from_pb(message.logprobs) if message.HasField("logprobs") else [],
        drafted=message.drafted,
        accepted=message.accepted,
    )


def deltas_from_pb(messages: Iterable[pb.TokenDelta]) -> list[TokenDelta]:
    """`delta_from_pb` of each."""
    return [delta_from_pb(message) for message in messages]


def record_to_pb(record: Record) -> pb.Record:
    """The record as it travels; every scalar is set."""
    sampling, stopping = record.sampling, record.stopping
    return pb.Record(
        request_id=record.request_id,
        model_id=record.model_id,
        tenant=record.tenant,
        cache_scope=record.cache_scope,
        prompt_token_ids=record.prompt,
        outputs=[
            pb.RecordOutput(
                token_ids=output.token_ids,
                logprobs=logprobs_to_pb(output.logprobs),
                finish_reason=finish_reason_to_pb(output.finish_reason),
            )
            for output in record.outputs
        ],
        sampling=pb.SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=dict(sampling.logit_bias),
            seed=sampling.seed,
            n=sampling.n,
        ),
        stopping=pb.StoppingParams(
            max_tokens=stopping.max_tokens,
            min_tokens=stopping.min_tokens,
            stop_token_ids=stopping.stop_token_ids,
            ignore_eos=stopping.ignore_eos,
        ),
        logprobs=record.logprobs,
        priority=record.priority,
        arrival_seconds=record.arrival,
        speculation=pb.SpeculationParams(mode=record.speculation.mode, max_tokens=record.speculation.max_tokens),
    )


def record_from_pb(message: pb.Record) -> Record:
    """Inverse of `record_to_pb`. Raises InvalidRequestError for a record no gateway would send."""
    n = message.sampling.n
    if not message.prompt_token_ids:
        raise InvalidRequestError("a record needs at least one prompt token", field="record.prompt_token_ids")
    if len(message.outputs) != n or n < 1:
        raise InvalidRequestError(
            f"a record needs one output per choice: n is {n}, outputs are {len(message.outputs)}",
            field="record.outputs",
        )
    return Record(
        request_id=message.request_id,
        model_id=message.model_id,
        prompt=list(message.prompt_token_ids),
        sampling=_sampling_from_pb(message.sampling),
        stopping=_stopping_from_pb(message.stopping),
        outputs=[
            OutputState(
                token_ids=list(output.token_ids),
                logprobs=logprobs_from_pb(output.logprobs),
                finish_reason=finish_reason_from_pb(output.finish_reason),
            )
            for output in message.outputs
        ],
        tenant=message.tenant,
        cache_scope=message.cache_scope,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        priority=message.priority,
        arrival=message.arrival_seconds,
        speculation=speculation_from_pb(message.speculation),
    )


def _sampling_from_pb(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed,
        n=message.n,
    )


def _stopping_from_pb(message: pb.StoppingParams) -> StopRules:
    return StopRules(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def speculation_from_pb(message: pb.SpeculationParams) -> Speculation:
    """Unset fields take their defaults."""
    return Speculation(message.mode or "auto", message.max_tokens if message.HasField("max_tokens") else None)


def layout_to_pb(layout: KvLayout) -> pb.KvLayout:
    """With the derived fields, for people and for `layout_from_pb`."""
    return pb.KvLayout(
        block_size=layout.block_size,
        dtype=layout.dtype,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        order=layout.order,
        tp_size=layout.tp_size,
        block_bytes=layout.block_bytes,
        layout_id=layout.layout_id,
    )


def layout_from_pb(message: pb.KvLayout) -> KvLayout:
    """Raises InvalidRequestError or IncompatibleError for a layout that can't be."""
    layout = KvLayout(
        block_size=message.block_size,
        dtype=message.dtype,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        order=message.order,
        tp_size=message.tp_size,
    )
    return layout.check_wire(message.block_bytes, message.layout_id)
