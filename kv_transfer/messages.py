"""What travels in one transfer stream, as plain data; mirrors proto/tandem/v1/kv_transfer.proto.

Values are as they came from the peer: the sessions check them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.kv_layout import KvLayout
from tandem.record import Record

MAX_INCARNATION = 256
"""Most characters of an incarnation, and most bytes where transports write it down."""
SECRET_BYTES = 32
"""Of a sender's secret, and of those that transports prove to each other."""


@dataclass(frozen=True, slots=True)
class Open:
    """First message of the sender: which lease and attempt, who it is, how its blocks lie and where they are."""

    lease_id: str
    attempt: int
    source_incarnation: str
    target_incarnation: str
    model_id: str
    numerics_id: str
    layout: KvLayout
    transport: str
    endpoint: bytes = field(default=b"", repr=False)
    secret: bytes = field(default=b"", repr=False)
    """Of the sender's process, told nowhere else: two transfers with it come from one process."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Answer to Open: the token range whose KV the receiver lacks."""

    needed_start: int
    needed_end: int
    block_size: int
    """Tokens a block of the receiver; `needed_start` and the end of each offer but the last are multiples of it."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Blocks of the sender's pool that hold the finished KV of tokens [token_start, token_end)."""

    sequence: int
    """From 0, without gaps."""
    token_start: int
    token_end: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    """Of `blocks`, when they were known to be held."""
    payload: bytes | memoryview = b""
    """The blocks one after another, when the bytes ride in the stream. A view where they came in."""
    checksums: tuple[int, ...] = ()
    """CRC-32 of each block's bytes, whenever they go over a network; empty where both ends see the same memory."""


@dataclass(frozen=True, slots=True)
class Ack:
    """The offer's blocks are in the receiver's pool."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Everything was offered; the receiver may own the sequence."""

    offers: int
    token_end: int
    record: Record


@dataclass(frozen=True, slots=True)
class Committed:
    """The receiver owns the sequence, by this attempt or (already) by another."""

    already_committed: bool
