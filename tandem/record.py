"""The record: everything a worker needs to continue a request, as plain data.

One definition for every process: the gateway builds it, prefill and decode run it, hand-off, preemption and migration
pass it on. All else (penalty counts, generator position) is replayed from it. No torch, no protobuf
(`tandem.service.wire` converts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why an output ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; every field resolved. Ranges are documented and checked by the gateway."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    n: int = 1

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True when logits depend on the tokens seen so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class StopRules:
    """When an output ends, as far as a worker decides it (stop strings are the gateway's)."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Speculation:
    """How drafts are made for a request. They change its speed, never its tokens."""

    mode: str = "auto"
    """"auto": by whatever the worker has; "off"; or the name of a proposer, of which a worker that hasn't it makes off.
    """
    max_tokens: int | None = None
    """Most drafts of one output in a step; None: the worker's own limit."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of one chosen token and of the likeliest alternatives (likeliest first)."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(slots=True)
class OutputState:
    """The tokens of one output so far; `logprobs` is parallel to `token_ids` or empty."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Record:
    """Everything a worker needs to continue."""

    request_id: str
    model_id: str
    prompt: list[int]
    sampling: SamplingParams
    stopping: StopRules
    outputs: list[OutputState]
    tenant: str = ""
    cache_scope: str = ""
    """From the tenant and the request's salt: prefix caches are shared within one scope only."""
    logprobs: int | None = None
    """Alternatives to report per token; None: no log probabilities."""
    priority: int = 0
    arrival: float = 0.0
    """Seconds since the epoch at the gateway."""
    speculation: Speculation = field(default_factory=Speculation)


@dataclass(slots=True)
class TokenDelta:
    """Consecutive tokens of one output; `position` is the place of the first within the output, from 0."""

    index: int
    position: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    drafted: int = 0
    """Drafts that were verified in the steps that gave these tokens."""
    accepted: int = 0
    """Of these, how many became tokens."""
