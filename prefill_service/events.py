"""What the scheduler tells the outside, and snapshots of it. Plain data; the servicer turns it into messages."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.record import TokenDelta
from worker import events


@dataclass(frozen=True, slots=True)
class Admission:
    """The request is in the queue."""

    cached_tokens: int
    """Tokens that the prefix cache holds of it now."""
    waiting_requests: int
    """How many wait, this one included."""


@dataclass(frozen=True, slots=True)
class Started:
    """Blocks for the whole prompt are reserved. `ready_tokens` came out of the prefix cache: offer them at once."""

    key: str
    cached_tokens: int
    """Tokens that need no computing; may end inside a block that is yet to be copied."""
    ready_tokens: int
    """Tokens whose KV is in `blocks` now; ends at a block boundary."""
    blocks: tuple[int, ...]
    """The request's blocks in order. They stay the same until it is released."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A chunk is done: KV of tokens [0, token_end) is in the request's blocks."""

    key: str
    token_end: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """The whole prompt is done. One delta per output that needed a token; none for outputs that have tokens already."""

    key: str
    deltas: list[TokenDelta]


Event = Started | Computed | Sampled | events.Failed
"""After a failure the blocks stay until the request is released."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the scheduler is now. Blocks include evictable ones."""

    running_requests: int
    waiting_requests: int
    sending_requests: int
    """Computed, and held until the transfer is over."""
    free_blocks: int
    total_blocks: int
    queued_prefill_tokens: int
    """Accepted and not yet computed."""


@dataclass(slots=True)
class Counters(events.Counters):
    """Counts since the start."""

    queried_tokens: int = 0
    """Tokens looked up in the prefix cache."""
