"""What the scheduler tells the outside after a step or a command. Plain data; the servicer turns it into messages."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import TandemError
from tandem.record import FinishReason, TokenDelta


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one request, each output's in order."""

    key: str
    deltas: list[TokenDelta]


@dataclass(frozen=True, slots=True)
class Finished:
    """One output needs no more tokens."""

    key: str
    index: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Ended:
    """Every output is finished; the scheduler holds nothing more for the request."""

    key: str
    preemptions: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The request was aboard a step that failed; the scheduler holds nothing more for it."""

    key: str
    error: TandemError


Event = Tokens | Finished | Ended | Failed


@dataclass(frozen=True, slots=True)
class Admission:
    """What a request was given. `blocks` are where the needed token range goes, in order."""

    key: str
    cached_tokens: int
    needed_start: int
    needed_end: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the scheduler is now; sequences are outputs, blocks include evictable ones."""

    running_sequences: int
    waiting_requests: int
    receiving_requests: int
    free_blocks: int
    total_blocks: int
    queued_prefill_tokens: int


@dataclass(slots=True)
class Counters:
    """Counts since the start."""

    preemptions: int = 0
    cancelled: int = 0
    steps_after_cancel: int = 0
    """Steps that cancelled requests took part in although they were launched after the cancel was posted."""
    worst_steps_after_cancel: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
