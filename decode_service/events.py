"""What the scheduler tells the outside after a step or a command. Plain data; the servicer turns it into messages."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.record import FinishReason, TokenDelta
from worker import events


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
    num_tokens: int
    """Of the output, those of the record included."""


@dataclass(frozen=True, slots=True)
class Ended:
    """Every output is finished; the scheduler holds nothing more for the request."""

    key: str
    preemptions: int


Event = Tokens | Finished | Ended | events.Failed
"""After a failure the scheduler holds nothing more for the request."""


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
class Counters(events.Counters):
    """Counts since the start."""

    preemptions: int = 0
