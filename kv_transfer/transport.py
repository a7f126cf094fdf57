"""What a transport is: one end beside the sender's pool, one beside the receiver's.

One file per transport implements both.

Life: `SourceTransport` made with the pool -> `endpoint()` goes into Open -> `offer_payload` per offer -> `close()`.
`TargetTransport` made once -> `connect` per transfer gives a `SourceView` -> `copy` per offer, `verify` before the
commit, `close` the view -> `close()`. A new transport (RDMA, device memory) implements these three and enters
`registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kv_transfer.messages import Offer
from kv_transfer.pool import PoolMemory
from tandem.kv_layout import KvLayout


def never() -> bool:
    """The `stop` of a copy that nobody stops."""
    return False


class SourceTransport(Protocol):
    """The sender's end. Thread-safe."""

    name: str
    pool: PoolMemory
    max_offer_bytes: int
    """An offer holds at most so many bytes of blocks, but at least one block."""

    def endpoint(self) -> bytes:
        """Where a target finds the pool; empty when bytes ride in the stream."""

    def offer_payload(self, blocks: Sequence[int]) -> tuple[bytes, tuple[int, ...]]:
        """Bytes of the blocks one after another and the CRC-32 of each, or (b"", ()).

        Copies: run it in a worker thread.
        """

    def close(self) -> None:
        """Take no more readers. Idempotent."""


class SourceView(Protocol):
    """One transfer's view of the sender's pool. Thread-safe."""

    def copy(
        self, offer: Offer, target_pool: PoolMemory, target_blocks: Sequence[int], stop: Callable[[], bool] = never
    ) -> None:
        """Copy the offer's blocks into `target_blocks`, checked. Blocking; the copying itself runs without the GIL.

        `stop` is asked before each block. Raises InvalidRequestError (impossible offer), StaleError (a generation
        changed, the view is closed, or stopped), DataCorruptionError (a checksum differs). Only after an
        UnsettledError (the sender can't be read any more) may `target_blocks` still be written.
        """

    def verify(self, offer: Offer) -> None:
        """Check the generations again, before the commit.

        Raises StaleError. Nothing to do where bytes rode in the stream.
        """

    def close(self) -> None:
        """No more copies begin; one that runs ends by itself, over memory that stays valid. Idempotent."""


class TargetTransport(Protocol):
    """The receiver's end. Thread-safe."""

    name: str
    side_by_side: bool
    """Copies from one sender may go side by side; else they wait for the sender, and would hold threads for nothing."""

    def claims(self, endpoint: bytes) -> tuple[bytes, ...]:
        """Parts of an endpoint that belong to one sender, beside the whole. Raises InvalidRequestError (malformed)."""

    def connect(self, endpoint: bytes, source_incarnation: str, layout: KvLayout) -> SourceView:
        """Find the sender's pool. May block for seconds: run it in a worker thread.

        Raises InvalidRequestError (malformed endpoint), UnavailableError (nobody there), StaleError (another
        incarnation is there), IncompatibleError (its pool isn't as `layout` says, or its memory isn't safe to read).
        """

    def close(self) -> None:
        """Forget every source. Idempotent."""
