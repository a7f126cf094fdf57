"""What a request and its stream are inside the gateway, as plain data: protobuf types stop at the servicer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tandem.record import FinishReason, SamplingParams, Speculation, StopRules, TokenLogprobs


@dataclass(frozen=True)
class Given:
    """What a client has of one output."""

    token_ids: tuple[int, ...] = ()
    text_bytes: int = 0
    reason: FinishReason | None = None


@dataclass(frozen=True)
class Resumed:
    """What a client has of a request that another gateway, or another connection, began."""

    outputs: tuple[Given, ...] = ()
    """One per choice; none when nothing has come yet."""
    seed: int | None = None
    model_id: str = ""
    numerics_id: str = ""


@dataclass(frozen=True)
class Asked:
    """A request as the client wrote it: None where a field was unset. Exactly one of the inputs is set, or none."""

    request_id: str = ""
    model: str = ""
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    """Set scalars of SamplingParams by name."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    logprobs: int | None = None
    skip_special: bool = True
    priority: int = 0
    cache_salt: str = ""
    speculation: Speculation = field(default_factory=Speculation)
    resume: Resumed | None = None


@dataclass(frozen=True)
class Job:
    """A checked request, ready to run. Times are of the event loop's clock unless said otherwise."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    stopping: StopRules
    stop: tuple[str, ...]
    include_stop: bool
    logprobs: int | None
    skip_special: bool
    priority: int
    started: float
    deadline: float
    arrival: float
    """Seconds since the epoch."""
    tenant: str = ""
    """Who asks, from the authenticated identity; empty where nobody has to say."""
    cache_scope: str = ""
    """See `gateway.tenants`."""
    speculation: Speculation = field(default_factory=Speculation)
    resumed: Resumed | None = None


@dataclass(slots=True)
class Admitted:
    """A worker has taken the request."""

    model: str
    model_id: str
    numerics_id: str


@dataclass(slots=True)
class Delta:
    """New tokens and text of one choice."""

    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs]


@dataclass(slots=True)
class Finished:
    """One choice is complete."""

    index: int
    reason: FinishReason
    stop_match: str | None


@dataclass(slots=True)
class Counted:
    """Usage and timings; seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    time_to_first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    total_seconds: float = 0.0
    migrations: int = 0
    preemptions: int = 0


Event = Admitted | Delta | Finished | Counted
