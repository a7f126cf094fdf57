"""The receiver's side of one transfer; the order of messages is told in `kv_transfer.session`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kv_transfer.landing import Landing
from kv_transfer.leases import COPY_WAIT_SECONDS, CommitResult, Lease, LeaseTable
from kv_transfer.messages import Ack, Commit, Committed, Offer, Open, Opened
from kv_transfer.peers import NOBODY, Identity, SenderTable
from kv_transfer.plan import TransferPlan, plan_transfer
from kv_transfer.pool import PoolMemory
from kv_transfer.ranks import RankViews, claims_of, connect_ranks
from kv_transfer.sending import WINDOW
from kv_transfer.staging import StagingPool
from kv_transfer.transport import TargetTransport
from tandem.errors import IncompatibleError, InternalError, InvalidRequestError, StaleError
from tandem.kv_layout import KvLayout, check_pair, same_numerics


@dataclass(frozen=True)
class Receiver:
    """What all transfers into one receiving worker share. `leases.incarnation` is the worker's."""

    leases: LeaseTable
    pool: PoolMemory
    layout: KvLayout
    model_id: str
    numerics_id: str
    transports: Mapping[str, TargetTransport] = field(default_factory=dict)
    """By name, best first."""
    senders: SenderTable = field(default_factory=SenderTable)
    copy_wait_seconds: float = COPY_WAIT_SECONDS
    """How long a copy waits for one of an earlier attempt."""
    convert_dtype: bool = False
    """Take KV of another dtype, and round."""
    other_pools: tuple[PoolMemory, ...] = ()
    """With tensor parallelism: of rank 1 and up."""
    staging: StagingPool = field(default_factory=StagingPool)

    def __post_init__(self) -> None:
        """Layout, pool and leases must speak of the same blocks; InternalError otherwise."""
        sizes = {pool.block_bytes for pool in self.pools}
        if sizes != {self.layout.block_bytes} or self.layout.block_size != self.leases.block_size:
            raise InternalError(f"pools or leases don't fit the layout {self.layout}")
        if len(self.pools) != self.layout.tp_size:
            raise InternalError(f"{len(self.pools)} pools for {self.layout.tp_size} ranks")

    @property
    def pools(self) -> tuple[PoolMemory, ...]:
        """One a rank."""
        return (self.pool, *self.other_pools)


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """What one offer needs: its tokens go to `target_blocks` of the receiver, block by block of the receiver's size."""

    offer: Offer
    target_blocks: tuple[int, ...]


class ReceiveSession:
    """One transfer as its receiver sees it.

    Messages in order from one thread at a time; `copy` from any, several at once.
    """

    def __init__(self, receiver: Receiver, window: int = WINDOW, identity: Identity = NOBODY) -> None:
        """`window`: most offers that are planned and not copied. `identity`: who opened the stream."""
        self._receiver = receiver
        self._identity = identity
        self._window = window
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._attempt = 0
        self._turn: str | None = None
        self._views: RankViews | None = None
        self._plan: TransferPlan | None = None
        self._closed = False
        self._offers: list[Offer] = []
        self._pending: set[int] = set()
        self._next_token = 0

    @property
    def lease(self) -> Lease:
        """The lease; InvalidRequestError before `on_open`."""
        if self._lease is None:
            raise InvalidRequestError("the first message of a transfer must be Open", field="event")
        return self._lease

    @property
    def turn(self) -> str | None:
        """Copies of sessions with one turn are to go one after another; None: side by side with all."""
        return self._turn

    def on_open(self, message: Open) -> Opened:
        """Check who it is and take the attempt. Connects to the sender's pool, so it may block: use a worker thread.

        Raises StaleError (incarnation, attempt), IncompatibleError (model, numerics, layout, transport),
        NotFoundError (lease), PermissionDeniedError (another sender's incarnation or endpoint), and what
        `TargetTransport.connect` raises.
        """
        if self._lease is not None:
            raise InvalidRequestError("a second Open in one transfer", field="event")
        here, transport = self._receiver, self._check_open(message)
        self._plan = plan_transfer(message.layout, here.layout)
        lease = self._receiver.leases.get(message.lease_id)
        claims = claims_of(transport, message.endpoint, message.layout)
        self._receiver.senders.check(self._identity, message, claims)
        lease.begin(message.attempt)
        self._lease, self._attempt = lease, message.attempt
        self._turn = None if transport.side_by_side else message.source_incarnation
        self._next_token = lease.needed_start
        views = connect_ranks(transport, message.endpoint, message.source_incarnation, message.layout)
        with self._lock:
            self._views = views
            closed = self._closed
        if closed:
            views.close()
            raise StaleError("the transfer ended while it connected", reason="TRANSFER_OVER")
        # Only now: what nobody could connect to must not stand against the real sender.
        self._receiver.senders.bind(self._identity, message, claims)
        return Opened(lease.needed_start, lease.needed_end, here.layout.block_size)

    def wait_for_older(self) -> None:
        """After `on_open`: until no copy of an older attempt is in flight. Blocking.

        `copy` waits as well, but a thread that copies is dearer. Raises what `Lease.copying` raises.
        """
        self.lease.wait_for_older(self._attempt, self._receiver.copy_wait_seconds)

    def _check_open(self, message: Open) -> TargetTransport:
        here = self._receiver
        if message.target_incarnation != here.leases.incarnation:
            raise StaleError("meant for another incarnation of this worker", reason="STALE_INCARNATION")
        if message.model_id != here.model_id:
            raise IncompatibleError(f"model_id differs: sender {message.model_id!r}, receiver {here.model_id!r}")
        check_pair(message.layout, here.layout, convert_dtype=here.convert_dtype)
        if not same_numerics(message.numerics_id, here.numerics_id, convert_dtype=here.convert_dtype):
            raise IncompatibleError(
                f"numerics_id differs: sender {message.numerics_id!r}, receiver {here.numerics_id!r}"
            )
        transport = here.transports.get(message.transport)
        if transport is None:
            raise IncompatibleError(
                f"transport {message.transport!r} isn't served here; served are {', '.join(here.transports)}"
            )
        return transport

    def on_offer(self, offer: Offer) -> CopyPlan:
        """Check the offer against what came before; the plan goes to `copy`. Raises InvalidRequestError, StaleError."""
        lease = self.lease
        if self._closed or not lease.is_current(self._attempt):
            raise StaleError(f"lease {lease.lease_id}: attempt {self._attempt} is over", reason="ATTEMPT_SUPERSEDED")
        layout = self._receiver.layout
        self._check_offer(offer, lease, layout.block_size)
        first = (offer.token_start - lease.needed_start) // layout.block_size
        with self._lock:
            if len(self._pending) >= self._window:
                raise InvalidRequestError(f"more than {self._window} unacknowledged offers", field="offer.sequence")
            self._pending.add(offer.sequence)
            # Kept for the commit's check: without the bytes, or a long prompt's whole KV would gather here.
            self._offers.append(replace(offer, payload=b"", checksums=()))
        self._next_token = offer.token_end
        count = layout.blocks_for(offer.token_end - offer.token_start)
        return CopyPlan(offer, lease.blocks[first : first + count])

    def _check_offer(self, offer: Offer, lease: Lease, size: int) -> None:
        if offer.sequence != len(self._offers):
            raise InvalidRequestError(f"offer {offer.sequence}, expected {len(self._offers)}", field="offer.sequence")
        if offer.token_start != self._next_token or not offer.token_start < offer.token_end <= lease.needed_end:
            raise InvalidRequestError(
                f"offer of tokens [{offer.token_start}, {offer.token_end}), expected from {self._next_token} "
                f"to at most {lease.needed_end}",
                field="offer.token_start",
            )
        if offer.token_end % size and offer.token_end != lease.needed_end:
            raise InvalidRequestError(
                f"offer ends at token {offer.token_end} inside a block of {size}", field="offer.token_end"
            )
        blocks = len(self._require_plan().source_span(offer.token_start, offer.token_end))
        if len(offer.blocks) != blocks or len(offer.generations) != blocks:
            raise InvalidRequestError(
                f"{len(offer.blocks)} blocks and {len(offer.generations)} generations for {blocks} blocks of tokens",
                field="offer.blocks",
            )

    def copy(self, plan: CopyPlan) -> Ack:
        """Copy one offer's blocks into the lease's, checked. Blocking: run it in a worker thread.

        Raises what `Landing.land` and `Lease.copying` raise; StaleError if the attempt ended meanwhile.
        """
        views, lease, here = self._require_views(), self.lease, self._receiver
        landing = Landing(self._require_plan(), here.pools, here.staging)
        with lease.copying(self._attempt, self._receiver.copy_wait_seconds) as superseded:

            def stop() -> bool:
                return self._closed or superseded()

            landing.land(views, plan.offer, plan.target_blocks, stop)
        return self.finish_offer(plan)

    def finish_offer(self, plan: CopyPlan) -> Ack:
        """The copy is over: its Ack, unless the attempt ended meanwhile (StaleError)."""
        if self._closed or not self.lease.is_current(self._attempt):
            raise StaleError("the transfer ended while it copied", reason="TRANSFER_OVER")
        with self._lock:
            self._pending.remove(plan.offer.sequence)
        return Ack(plan.offer.sequence)

    def on_commit(self, message: Commit) -> Committed:
        """Check that all arrived and is still what was offered, then compare-and-set.

        Call it when every `copy` has returned.

        Raises InvalidRequestError (incomplete), StaleError (a generation, the attempt or the lease), InternalError (a
        copy runs).
        """
        lease = self.lease
        if not lease.is_current(self._attempt):
            # Never current again, so this changes nothing: ALREADY if another attempt committed, else StaleError.
            return Committed(already_committed=lease.commit(self._attempt) is CommitResult.ALREADY)
        views = self._require_views()
        self._check_commit(message, lease)
        with self._lock:
            if self._pending:
                raise InternalError(f"commit while {len(self._pending)} offers are being copied")
        for offer in self._offers:
            views.verify(offer)
        return Committed(already_committed=lease.commit(self._attempt) is CommitResult.ALREADY)

    def _check_commit(self, message: Commit, lease: Lease) -> None:
        if message.offers != len(self._offers):
            raise InvalidRequestError(
                f"commit of {message.offers} offers, {len(self._offers)} came", field="commit.offers"
            )
        if message.token_end != lease.needed_end or self._next_token != lease.needed_end:
            raise InvalidRequestError(
                f"commit at token {message.token_end} after offers to {self._next_token}, needed: {lease.needed_end}",
                field="commit.token_end",
            )
        if message.record.request_id != lease.request_id:
            raise InvalidRequestError("the record is of another request", field="commit.record.request_id")

    def _require_plan(self) -> TransferPlan:
        """There since `on_open`, as the lease is."""
        assert self._plan is not None
        return self._plan

    def _require_views(self) -> RankViews:
        with self._lock:
            if self._views is None or self._closed:
                raise StaleError("the transfer isn't open", reason="TRANSFER_OVER")
            return self._views

    def close(self) -> None:
        """The stream ended: no more copies begin, those in flight stop at the next block.

        The lease stays. Idempotent.
        """
        with self._lock:
            self._closed = True
            views = self._views
        if views is not None:
            views.close()
