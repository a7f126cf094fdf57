"""Public protobuf messages to plain data and back."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.chat import MAX_MESSAGES
from gateway.config import Limits
from gateway.plain import Admitted, Asked, Counted, Delta, Event, Finished, Given, Job, Resumed
from gateway.validation import check_count
from tandem.record import FinishReason, TokenLogprobs
from tandem.service import wire
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import types_pb2

_SCALARS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
)


def asked(request: pb.GenerateRequest | pb.GenerateStreamRequest, limits: Limits) -> Asked:
    """What the client wrote, unset fields as None. Raises InvalidRequestError for lists that are too long to copy."""
    sampling, stopping, output = request.sampling, request.stopping, request.output
    kind = request.WhichOneof("input")
    check_count("token_ids", len(request.token_ids.ids), limits.max_token_ids)
    check_count("stopping.stop", len(stopping.stop), limits.max_stop_strings)
    check_count("stopping.stop_token_ids", len(stopping.stop_token_ids), limits.max_stop_token_ids)
    check_count("sampling.logit_bias", len(sampling.logit_bias), limits.max_logit_bias)
    return Asked(
        request_id=request.request_id,
        model=request.model,
        text=request.text if kind == "text" else None,
        token_ids=tuple(request.token_ids.ids) if kind == "token_ids" else None,
        messages=messages(request.messages) if kind == "messages" else None,
        sampling={name: getattr(sampling, name) for name in _SCALARS if sampling.HasField(name)},  # type: ignore[arg-type]
        logit_bias=dict(sampling.logit_bias),
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        min_tokens=stopping.min_tokens if stopping.HasField("min_tokens") else None,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        include_stop=stopping.include_stop_in_output,
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        skip_special=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
        priority=request.priority,
        cache_salt=request.cache_salt,
        speculation=wire.speculation_from_pb(request.speculation),
        resume=_resumed(request.resume, limits) if request.HasField("resume") else None,
    )


def _resumed(resume: pb.Resume, limits: Limits) -> Resumed:
    check_count("resume.outputs", len(resume.outputs), limits.max_n)
    count = sum(len(output.token_ids) for output in resume.outputs)
    check_count("resume.outputs.token_ids", count, limits.max_token_ids)
    return Resumed(
        outputs=tuple(
            Given(tuple(output.token_ids), output.text_bytes, wire.finish_reason_from_pb(output.finish_reason))
            for output in resume.outputs
        ),
        seed=resume.seed if resume.HasField("seed") else None,
        model_id=resume.model_id,
        numerics_id=resume.numerics_id,
    )


def messages(chat: pb.ChatMessages) -> tuple[tuple[str, str], ...]:
    """(role, content) pairs. Raises InvalidRequestError for more than any chat has."""
    check_count("messages", len(chat.messages), MAX_MESSAGES)
    return tuple((message.role, message.content) for message in chat.messages)


def usage(counted: Counted) -> types_pb2.Usage:
    """Token counts."""
    return types_pb2.Usage(
        prompt_tokens=counted.prompt_tokens,
        cached_tokens=counted.cached_tokens,
        completion_tokens=counted.completion_tokens,
        draft_tokens=counted.draft_tokens,
        accepted_draft_tokens=counted.accepted_draft_tokens,
    )


def timings(counted: Counted) -> types_pb2.Timings:
    """Seconds and counts."""
    return types_pb2.Timings(
        queue_seconds=counted.queue_seconds,
        prefill_seconds=counted.prefill_seconds,
        time_to_first_token_seconds=counted.time_to_first_token_seconds,
        decode_seconds=counted.decode_seconds,
        total_seconds=counted.total_seconds,
        migrations=counted.migrations,
        preemptions=counted.preemptions,
    )


def stream_response(event: Event, job: Job) -> pb.GenerateStreamResponse:
    """One event as it travels."""
    response = pb.GenerateStreamResponse(request_id=job.request_id)
    if isinstance(event, Delta):
        delta = response.delta  # filled in place: this runs for every token
        delta.SetInParent()
        delta.index, delta.text = event.index, event.text
        delta.token_ids.extend(event.token_ids)
        if event.logprobs:
            delta.logprobs.CopyFrom(wire.logprobs_to_pb(event.logprobs))  # type: ignore[arg-type]
    elif isinstance(event, Finished):
        reason = wire.finish_reason_to_pb(event.reason)
        finished = pb.ChoiceFinished(index=event.index, finish_reason=reason, stop_match=event.stop_match or "")
        response.finished.CopyFrom(finished)
    elif isinstance(event, Admitted):
        response.prompt.CopyFrom(
            pb.PromptAccepted(
                model=event.model,
                prompt_tokens=len(job.prompt),
                seed=job.sampling.seed,
                model_id=event.model_id,
                numerics_id=event.numerics_id,
            )
        )
    else:
        response.end.CopyFrom(pb.GenerationEnd(usage=usage(event), timings=timings(event)))
    return response


class Collected:
    """Joins the events of a stream to one response."""

    def __init__(self, request_id: str, choices: int) -> None:
        """`choices` empty choices."""
        self._request_id, self._model = request_id, ""
        self._choices = [pb.Choice(index=i) for i in range(choices)]
        self._text: list[list[str]] = [[] for _ in range(choices)]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in range(choices)]
        self._counted = Counted()

    def add(self, event: Event) -> None:
        """In order."""
        if isinstance(event, Delta):
            self._choices[event.index].token_ids.extend(event.token_ids)
            self._text[event.index].append(event.text)
            self._logprobs[event.index] += event.logprobs
        elif isinstance(event, Finished):
            self._finish(self._choices[event.index], event.reason, event.stop_match)
        elif isinstance(event, Admitted):
            self._model = event.model
        else:
            self._counted = event

    @staticmethod
    def _finish(choice: pb.Choice, reason: FinishReason, stop_match: str | None) -> None:
        choice.finish_reason = wire.finish_reason_to_pb(reason)
        choice.stop_match = stop_match or ""

    def response(self) -> pb.GenerateResponse:
        """The whole."""
        for choice, text, logprobs in zip(self._choices, self._text, self._logprobs, strict=True):
            choice.text = "".join(text)
            if logprobs:
                choice.logprobs.CopyFrom(wire.logprobs_to_pb(logprobs))  # type: ignore[arg-type]
        return pb.GenerateResponse(
            request_id=self._request_id,
            model=self._model,
            choices=self._choices,
            usage=usage(self._counted),
            timings=timings(self._counted),
        )


def model(name: str, info: types_pb2.WorkerInfo, prefill: int, decode: int) -> pb.Model:
    """A model as clients see it."""
    return pb.Model(
        name=name,
        model_id=info.model_id,
        architecture=info.architecture,
        quantization=info.quantization,
        max_context=info.max_context,
        vocab_size=info.vocab_size,
        eos_token_ids=_ids(info.eos_token_ids),
        prefill_workers=prefill,
        decode_workers=decode,
    )


def _ids(ids: Iterable[int]) -> list[int]:
    return list(ids)
