"""What the client takes and gives: plain typed data, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from tandem.record import FinishReason, TokenLogprobs

Message = Mapping[str, str]
"""One chat message: {"role": "user", "content": "..."}."""


class Options(TypedDict, total=False):
    """Optional keywords of generate, stream and chat. What is absent takes the server's default
    (proto/tandem/v1/types.proto).
    """

    model: str
    request_id: str
    priority: int
    cache_salt: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_in_output: bool
    logprobs: int
    skip_special_tokens: bool
    speculation: str
    """auto, off or the name of a proposer of drafts."""
    speculation_tokens: int
    """Most drafts of one output in a step."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted for a request; completion tokens are those of all choices."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    draft_tokens: int = 0
    """Drafts that were verified."""
    accepted_draft_tokens: int = 0
    """Of these, those that became output tokens."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in seconds; see Timings in types.proto."""

    queue_seconds: float
    prefill_seconds: float
    time_to_first_token_seconds: float
    decode_seconds: float
    total_seconds: float
    migrations: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class PromptAccepted:
    """First event of a stream."""

    request_id: str
    model: str
    prompt_tokens: int
    seed: int = 0
    """The request's, or the one that the gateway drew."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of one choice, never cumulative. Either may be empty, because text can lag behind tokens."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """One choice ended. `stop_match` is the stop string that matched, or empty."""

    index: int
    finish_reason: FinishReason | None
    stop_match: str = ""


@dataclass(frozen=True, slots=True)
class End:
    """Last event of a stream."""

    usage: Usage
    timings: Timings


Event = PromptAccepted | Delta | Finished | End


@dataclass(frozen=True, slots=True)
class Choice:
    """One output. `logprobs` is parallel to `token_ids`, or empty when none were asked for."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_match: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A whole answer. `text`, `token_ids` and `finish_reason` are those of the first choice."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first choice's tokens."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served."""

    name: str
    model_id: str
    architecture: str
    quantization: str
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    prefill_workers: int
    decode_workers: int
