"""Requests from keywords and results from messages, the same for both clients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message as ProtoMessage

from tandem.client.types import (
    Choice,
    Delta,
    End,
    Event,
    Finished,
    GenerateResult,
    Message,
    Model,
    Options,
    PromptAccepted,
    Timings,
    Usage,
)
from tandem.errors import InternalError, InvalidRequestError
from tandem.service.wire import finish_reason_from_pb, logprobs_from_pb
from tandem.v1 import inference_pb2, types_pb2

SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "seed", "n"),
)
STOPPING = ("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop_in_output")
OUTPUT = ("logprobs", "skip_special_tokens")
SPECULATION = {"speculation": "mode", "speculation_tokens": "max_tokens"}
LONGEST_TIMEOUT = 365 * 86_400.0
TOP = ("model", "request_id", "priority", "cache_salt")

Filled = TypeVar("Filled", bound=ProtoMessage)
Request = TypeVar("Request", inference_pb2.GenerateRequest, inference_pb2.GenerateStreamRequest)


def build_request(
    kind: type[Request],
    prompt: str | None,
    token_ids: Sequence[int] | None,
    messages: Sequence[Message] | None,
    options: Options,
) -> Request:
    """One request message. Raises InvalidRequestError for what can't even be sent; ranges are the server's to check."""
    if sum(given is not None for given in (prompt, token_ids, messages)) != 1:
        raise InvalidRequestError("give exactly one of prompt, token_ids and messages", field="input")
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    unknown = sorted(set(given).difference(TOP, SAMPLING, STOPPING, OUTPUT, SPECULATION))
    if unknown:
        raise InvalidRequestError(f"unknown option {unknown[0]!r}", field=unknown[0])
    with _sendable("text" if prompt is not None else "messages" if token_ids is None else "token_ids"):
        request = kind(**_input(prompt, token_ids, messages))
    request.sampling.CopyFrom(_filled(types_pb2.SamplingParams(), "sampling.", _pick(given, SAMPLING)))
    request.stopping.CopyFrom(_filled(types_pb2.StoppingParams(), "stopping.", _pick(given, STOPPING)))
    request.output.CopyFrom(_filled(inference_pb2.OutputParams(), "output.", _pick(given, OUTPUT)))
    if any(name in given for name in SPECULATION):
        values = {field: given[name] for name, field in SPECULATION.items() if name in given}
        request.speculation.CopyFrom(_filled(types_pb2.SpeculationParams(), "speculation.", values))
    return _filled(request, "", _pick(given, TOP))


@contextlib.contextmanager
def _sendable(field: str) -> Iterator[None]:
    """Names the field whose value fits no message. Raises InvalidRequestError."""
    try:
        yield
    except UnicodeError as exc:
        raise InvalidRequestError(f"{field}: not valid Unicode text: {exc}", field=field) from exc
    except (TypeError, ValueError) as exc:
        raise InvalidRequestError(f"{field}: wrong type or out of range: {exc}", field=field) from exc


def _filled(message: Filled, path: str, values: dict[str, Any]) -> Filled:
    """`message` with `values`, each set on its own, so that a bad one is told by name."""
    for key, value in values.items():
        with _sendable(f"{path}{key}"):
            message.MergeFrom(type(message)(**{key: value}))
    return message


def _input(prompt: str | None, token_ids: Sequence[int] | None, messages: Sequence[Message] | None) -> dict[str, Any]:
    if prompt is not None:
        return {"text": prompt}
    if token_ids is not None:
        return {"token_ids": inference_pb2.TokenIds(ids=token_ids)}
    return {"messages": chat_messages(messages or ())}


def chat_messages(messages: Sequence[Message]) -> inference_pb2.ChatMessages:
    """Raises InvalidRequestError for a message that isn't a role and a content."""
    for index, message in enumerate(messages):
        texts = isinstance(message, Mapping) and all(isinstance(text, str) for text in message.values())
        if not texts or set(message) != {"role", "content"}:
            problem = "a message has the keys role and content, both texts"
            raise InvalidRequestError(problem, field=f"messages.messages[{index}]")
    return inference_pb2.ChatMessages(
        messages=[inference_pb2.ChatMessage(role=m["role"], content=m["content"]) for m in messages]
    )


def result_of(response: inference_pb2.GenerateResponse) -> GenerateResult:
    """A whole answer. Raises InternalError for one without choices, which no server of ours sends."""
    if not response.choices:
        raise InternalError("the server answered without a choice")
    return GenerateResult(
        request_id=response.request_id,
        model=response.model,
        choices=tuple(
            Choice(
                index=choice.index,
                text=choice.text,
                token_ids=tuple(choice.token_ids),
                finish_reason=finish_reason_from_pb(choice.finish_reason),
                stop_match=choice.stop_match,
                logprobs=tuple(logprobs_from_pb(choice.logprobs)),
            )
            for choice in response.choices
        ),
        usage=_usage(response.usage),
        timings=_timings(response.timings),
    )


def events_of(response: inference_pb2.GenerateStreamResponse) -> Iterator[Event]:
    """The event in a stream's message; none for a kind that a later version added."""
    kind = response.WhichOneof("event")
    if kind == "prompt":
        prompt = response.prompt
        yield PromptAccepted(response.request_id, prompt.model, prompt.prompt_tokens, prompt.seed)
    elif kind == "delta":
        delta = response.delta
        logprobs = tuple(logprobs_from_pb(delta.logprobs)) if delta.HasField("logprobs") else ()
        yield Delta(delta.index, delta.text, tuple(delta.token_ids), logprobs)
    elif kind == "finished":
        done = response.finished
        yield Finished(done.index, finish_reason_from_pb(done.finish_reason), done.stop_match)
    elif kind == "end":
        yield End(_usage(response.end.usage), _timings(response.end.timings))


def model_of(message: inference_pb2.Model) -> Model:
    """One served model."""
    return Model(
        name=message.name,
        model_id=message.model_id,
        architecture=message.architecture,
        quantization=message.quantization,
        max_context=message.max_context,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        prefill_workers=message.prefill_workers,
        decode_workers=message.decode_workers,
    )


def tokenize_request(text: str | None, messages: Sequence[Message] | None, model: str) -> inference_pb2.TokenizeRequest:
    """Raises InvalidRequestError unless exactly one of text and messages is given."""
    if (text is None) == (messages is None):
        raise InvalidRequestError("give either text or messages", field="input")
    try:
        if messages is not None:
            return inference_pb2.TokenizeRequest(model=model, messages=chat_messages(messages))
        return inference_pb2.TokenizeRequest(model=model, text=text or "")
    except (TypeError, ValueError) as exc:
        raise InvalidRequestError(f"this can't be tokenized: {exc}", field="input") from exc


def detokenize_request(
    token_ids: Sequence[int], model: str, *, skip_special_tokens: bool
) -> inference_pb2.DetokenizeRequest:
    """Raises InvalidRequestError for what can be no token id."""
    try:
        return inference_pb2.DetokenizeRequest(
            model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
    except (TypeError, ValueError) as exc:
        raise InvalidRequestError(f"not a list of token ids: {exc}", field="token_ids") from exc


def deadline(timeout: float | None, default: float | None) -> float | None:
    """Seconds for gRPC, which takes endless ones for none left. Raises InvalidRequestError for NaN."""
    seconds = default if timeout is None else timeout
    if seconds is None or seconds < LONGEST_TIMEOUT:
        return seconds
    if math.isnan(seconds):
        raise InvalidRequestError("a timeout is a number of seconds", field="timeout")
    return LONGEST_TIMEOUT


def _usage(message: types_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        completion_tokens=message.completion_tokens,
        draft_tokens=message.draft_tokens,
        accepted_draft_tokens=message.accepted_draft_tokens,
    )


def _timings(message: types_pb2.Timings) -> Timings:
    return Timings(
        queue_seconds=message.queue_seconds,
        prefill_seconds=message.prefill_seconds,
        time_to_first_token_seconds=message.time_to_first_token_seconds,
        decode_seconds=message.decode_seconds,
        total_seconds=message.total_seconds,
        migrations=message.migrations,
        preemptions=message.preemptions,
    )


def _pick(given: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}
