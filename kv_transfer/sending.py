"""The sender's side of one transfer; the order of messages is told in `kv_transfer.session`."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from kv_transfer.messages import SECRET_BYTES, Ack, Commit, Committed, Offer, Open, Opened
from kv_transfer.transport import SourceTransport
from tandem.errors import InternalError, InvalidRequestError, StaleError
from tandem.kv_layout import KvLayout
from tandem.record import Record

WINDOW = 8
"""Most unacknowledged offers."""


@dataclass(frozen=True)
class Sender:
    """What all transfers of one sending worker share."""

    incarnation: str
    model_id: str
    numerics_id: str
    layout: KvLayout
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(SECRET_BYTES), repr=False)
    """See `Open.secret`."""


class SendSession:
    """One transfer as its sender sees it. `ready` and `next_offer` from one thread at a time; `on_ack` from any."""

    def __init__(
        self,
        sender: Sender,
        transport: SourceTransport,
        *,
        lease_id: str,
        attempt: int,
        target_incarnation: str,
        window: int = WINDOW,
    ) -> None:
        """`lease_id`, `attempt` and `target_incarnation` as the gateway gave them."""
        if transport.pool.block_bytes != sender.layout.block_bytes:
            raise InternalError(f"the pool doesn't fit the layout {sender.layout}")
        self._sender = sender
        self._transport = transport
        self._lease_id = lease_id
        self._attempt = attempt
        self._target_incarnation = target_incarnation
        self._window = window
        self._lock = threading.Lock()
        self._needed: tuple[int, int] | None = None
        self._step = 1
        self._ready_end = 0
        self._blocks: list[int] = []
        self._generations: list[int] = []
        self._offered_end = 0
        self._sequence = 0
        self._unacknowledged: set[int] = set()
        self._committing = False
        self.bytes_offered = 0
        """Bytes of the blocks offered so far."""

    def open(self) -> Open:
        """The first message."""
        sender = self._sender
        return Open(
            lease_id=self._lease_id,
            attempt=self._attempt,
            source_incarnation=sender.incarnation,
            target_incarnation=self._target_incarnation,
            model_id=sender.model_id,
            numerics_id=sender.numerics_id,
            layout=sender.layout,
            transport=self._transport.name,
            endpoint=self._transport.endpoint(),
            secret=sender.secret,
        )

    def on_opened(self, opened: Opened) -> None:
        """Learn the needed range, which may begin inside a block of this side.

        Raises InvalidRequestError for an impossible one or a second Opened.
        """
        start, end, step = opened.needed_start, opened.needed_end, opened.block_size
        if self._needed is not None or step < 1 or not 0 <= start <= end or start % step:
            raise InvalidRequestError(
                f"unexpected Opened for tokens [{start}, {end}) in blocks of {step}", field="opened"
            )
        self._offered_end, self._step = start, step
        self._needed = (start, end)

    def ready(self, token_end: int, block_table: Sequence[int]) -> None:
        """Tokens [0, token_end) are computed and lie in `block_table` (from position 0; longer is fine).

        Call it only while the request holds its blocks: their generations are taken here. Raises InternalError when
        tokens go backwards or blocks are missing.
        """
        needed = self._sender.layout.blocks_for(token_end)
        known = len(self._blocks)
        if token_end < self._ready_end or len(block_table) < needed:
            raise InternalError(f"{token_end} tokens in {len(block_table)} blocks after {self._ready_end} tokens")
        self._ready_end = token_end
        added = block_table[known:needed]
        self._blocks.extend(added)
        self._generations.extend(self._transport.pool.generations[block] for block in added)

    def next_offer(self) -> Offer | None:
        """The next offer, or None while nothing is ready or the window is full. May copy bytes: use a worker thread.

        Raises StaleError if a block was handed out again since `ready` (the request was cancelled meanwhile).
        """
        with self._lock:
            if len(self._unacknowledged) >= self._window:
                return None
        end = self._next_end()
        if end is None:
            return None
        size, start = self._sender.layout.block_size, self._offered_end
        # With blocks unlike the receiver's, the first may have been in the last offer, too.
        span = slice(start // size, self._sender.layout.blocks_for(end))
        blocks, generations = tuple(self._blocks[span]), tuple(self._generations[span])
        payload, checksums = self._transport.offer_payload(blocks)
        held = self._transport.pool.generations
        if any(held[block] != generation for block, generation in zip(blocks, generations, strict=True)):
            raise StaleError("a block was handed out again while it was offered", reason="STALE_GENERATION")
        offer = Offer(self._sequence, start, end, blocks, generations, payload, checksums)
        with self._lock:
            self._unacknowledged.add(self._sequence)
        self._sequence += 1
        self._offered_end = end
        self.bytes_offered += len(blocks) * self._sender.layout.block_bytes * self._sender.layout.tp_size
        return offer

    def _next_end(self) -> int | None:
        """Where the next offer ends; None: nothing to offer.

        At the end of a block of the receiver, or the needed end: so a block of the receiver comes whole in one offer.
        """
        if self._needed is None or self._offered_end == self._needed[1]:
            return None
        layout, start, needed_end = self._sender.layout, self._offered_end, self._needed[1]
        size, step = layout.block_size, self._step
        # A block that more tokens will come into is not offered, but for the last.
        ready = needed_end if self._ready_end >= needed_end else self._ready_end // size * size
        most_blocks = max(1, self._transport.max_offer_bytes // layout.block_bytes)
        most = max((start // size + most_blocks) * size, start + step)
        end = min(ready, most)
        if end < needed_end:
            end = end // step * step
        return end if end > start else None

    def on_ack(self, ack: Ack) -> None:
        """Raises InvalidRequestError for an offer that isn't waiting for its Ack."""
        with self._lock:
            if ack.sequence not in self._unacknowledged:
                raise InvalidRequestError(f"Ack of offer {ack.sequence}, which isn't outstanding", field="ack.sequence")
            self._unacknowledged.remove(ack.sequence)

    @property
    def opened(self) -> bool:
        """True once the receiver has said what it needs."""
        return self._needed is not None

    @property
    def unacknowledged(self) -> int:
        """Offers whose Ack has not come."""
        with self._lock:
            return len(self._unacknowledged)

    @property
    def all_offered(self) -> bool:
        """True when nothing is left to offer, so that `commit` may come; Acks may be outstanding."""
        return self._needed is not None and self._offered_end == self._needed[1]

    def commit(self, record: Record) -> Commit:
        """The last message; `record` holds the first token of each output.

        Raises InternalError before `all_offered`.
        """
        if self._needed is None or not self.all_offered or self._committing:
            raise InternalError("a commit needs every offer sent, and comes once")
        self._committing = True
        return Commit(self._sequence, self._needed[1], record)

    def on_committed(self, committed: Committed) -> bool:
        """True: this attempt committed; False: another had. Raises InvalidRequestError if Commit wasn't sent."""
        if not self._committing:
            raise InvalidRequestError("Committed without a Commit", field="committed")
        # The receiver's pool owns everything now: whatever Acks were outstanding are implied.
        with self._lock:
            self._unacknowledged.clear()
        return not committed.already_committed
