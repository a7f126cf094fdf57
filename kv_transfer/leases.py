"""Who may write which blocks of the receiver, and until when.

Life of a lease: granted (RECEIVING, attempt a) -> `begin(a)` when a sender opens -> copies -> `commit(a)`
(COMMITTED), or `retarget(a + 1)` and again; from either state `close()` (CLOSED) -> released, once, when the last
copy in flight is over. The Decode RPC owns the lease: its end, however it comes, calls `close`. `on_released` frees
the blocks.

Two late things are dangerous. A late message: everything names its attempt, and an old attempt is refused. A late
copy, of a superseded attempt or a closed lease, still writing: blocks are not released under it, and copies of a
newer attempt wait until it is over, so that it can't scribble over what they brought.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum

from kv_transfer.unsettled import lent
from tandem.errors import InternalError, NotFoundError, OverloadedError, StaleError, UnavailableError

Callback = Callable[[], None]
COPY_WAIT_SECONDS = 5.0


class LeaseState(Enum):
    """Where a lease is in its life."""

    RECEIVING = "receiving"
    COMMITTED = "committed"
    CLOSED = "closed"


class CommitResult(Enum):
    """What a commit changed."""

    COMMITTED = "committed"
    ALREADY = "already"


class Lease:
    """The right to fill `blocks` with the KV of tokens [needed_start, needed_end). Thread-safe."""

    def __init__(
        self,
        lease_id: str,
        request_id: str,
        attempt: int,
        needed: tuple[int, int],
        blocks: tuple[int, ...],
        on_released: Callback,
    ) -> None:
        """Made by `LeaseTable.grant`."""
        self.lease_id = lease_id
        self.request_id = request_id
        self.needed_start, self.needed_end = needed
        self.blocks = blocks
        """blocks[i] holds the tokens from needed_start + i * block_size on."""
        self._on_released = on_released
        self._changed = threading.Condition()
        self._state = LeaseState.RECEIVING
        self._attempt = attempt
        self._open = False
        self._local = False
        self._committed = False
        self._released = False
        self._in_flight: Counter[int] = Counter()
        self._when_quiet: list[Callback] = []

    @property
    def state(self) -> LeaseState:
        """Now; another thread may change it at once."""
        return self._state

    @property
    def attempt(self) -> int:
        """The attempt that may write now."""
        return self._attempt

    @property
    def committed(self) -> bool:
        """True once an attempt has committed, closed or not."""
        return self._committed

    @property
    def copies_in_flight(self) -> int:
        """Copies that run now, of every attempt."""
        return self._in_flight.total()

    @property
    def released(self) -> bool:
        """True once `on_released` was called."""
        return self._released

    def begin(self, attempt: int) -> None:
        """A sender opens a transfer.

        Raises StaleError unless it is the current, remote attempt and its first transfer.
        """
        with self._changed:
            self._require_current(attempt)
            if self._local or self._open:
                what = "is computed locally" if self._local else "has a transfer already"
                raise StaleError(f"lease {self.lease_id}: attempt {attempt} {what}", reason="ATTEMPT_TAKEN")
            self._open = True

    def retarget(self, attempt: int, *, local: bool = False) -> bool:
        """Make `attempt` the only one that may write. True: an earlier one had committed and nothing changed.

        `local`: the receiver computes the blocks itself; wait with `when_quiet` before it writes them.
        Raises StaleError when the lease is closed or `attempt` is not above the current one.
        """
        with self._changed:
            if self._state is LeaseState.CLOSED:
                raise self._stale("is closed", "LEASE_CLOSED")
            if self._committed:
                return True
            if attempt <= self._attempt:
                raise self._stale(f"is at attempt {self._attempt}, not below {attempt}", "ATTEMPT_SUPERSEDED")
            self._attempt, self._open, self._local = attempt, False, local
            self._changed.notify_all()
            return False

    def commit(self, attempt: int) -> CommitResult:
        """Compare-and-set on the attempt: COMMITTED exactly once, ALREADY afterwards.

        Raises StaleError when the lease is closed or at another attempt, InternalError while a copy is in flight.
        """
        with self._changed:
            if self._committed and self._state is not LeaseState.CLOSED:
                return CommitResult.ALREADY
            self._require_current(attempt)
            if self.copies_in_flight:
                raise InternalError(f"lease {self.lease_id}: commit with {self.copies_in_flight} copies in flight")
            self._state = LeaseState.COMMITTED
            self._committed = True
            return CommitResult.COMMITTED

    def wait_for_older(self, attempt: int, timeout: float = COPY_WAIT_SECONDS) -> None:
        """Until no copy of an older attempt is in flight, as `copying` does. Raises what it raises."""
        with self._changed:
            self._wait_for_older(attempt, timeout)

    @contextmanager
    def copying(self, attempt: int, timeout: float = COPY_WAIT_SECONDS) -> Iterator[Callable[[], bool]]:
        """Around one copy into the blocks; gives the copy's `stop`.

        Waits up to `timeout` s for copies of older attempts. One that fails and may still write stays in flight
        (`kv_transfer.unsettled`).

        Raises StaleError if the attempt may not write (any more), UnavailableError if an older copy doesn't end.
        """
        self._begin_copy(attempt, timeout)
        with lent(lambda: self._end_copy(attempt)):
            yield lambda: not self.is_current(attempt)

    def is_current(self, attempt: int) -> bool:
        """True while `attempt` may write."""
        with self._changed:
            return self._state is LeaseState.RECEIVING and attempt == self._attempt

    def when_quiet(self, callback: Callback) -> None:
        """Call back once no copy is in flight: now, or from the thread that ends the last one."""
        with self._changed:
            if self.copies_in_flight:
                self._when_quiet.append(callback)
                return
        callback()

    def close(self) -> bool:
        """End the lease; `on_released` runs now or when the last copy in flight is over.

        True for the call that closed it.
        """
        with self._changed:
            if self._state is LeaseState.CLOSED:
                return False
            self._state = LeaseState.CLOSED
            self._changed.notify_all()
            due = self._take_due()
        _run(due)
        return True

    def _require_current(self, attempt: int) -> None:
        if self._state is LeaseState.CLOSED:
            raise self._stale("is closed", "LEASE_CLOSED")
        if self._state is LeaseState.COMMITTED:
            raise self._stale("is committed", "ALREADY_COMMITTED")
        if attempt != self._attempt:
            raise self._stale(f"is at attempt {self._attempt}, not {attempt}", "ATTEMPT_SUPERSEDED")

    def _stale(self, what: str, reason: str) -> StaleError:
        return StaleError(f"lease {self.lease_id} {what}", reason=reason)

    def _begin_copy(self, attempt: int, timeout: float) -> None:
        with self._changed:
            self._wait_for_older(attempt, timeout)
            self._in_flight[attempt] += 1

    def _wait_for_older(self, attempt: int, timeout: float) -> None:
        def settled() -> bool:
            return set(self._in_flight) <= {attempt} or not self.is_current(attempt)

        self._require_current(attempt)
        if not self._changed.wait_for(settled, timeout):
            raise UnavailableError(
                f"lease {self.lease_id}: a copy of an earlier attempt is still running", reason="COPY_IN_FLIGHT"
            )
        self._require_current(attempt)

    def _end_copy(self, attempt: int) -> None:
        with self._changed:
            self._in_flight[attempt] -= 1
            if not self._in_flight[attempt]:
                del self._in_flight[attempt]
            self._changed.notify_all()
            due = self._take_due()
        _run(due)

    def _take_due(self) -> list[Callback]:
        """Callbacks whose time has come, each taken once. Called with the lock held; run without it."""
        if self._in_flight:
            return []
        due, self._when_quiet = self._when_quiet, []
        if self._state is LeaseState.CLOSED and not self._released:
            self._released = True
            due.append(self._on_released)
        return due


def _run(callbacks: list[Callback]) -> None:
    """Run all, in order, even if one raises."""
    with ExitStack() as stack:
        for callback in reversed(callbacks):
            stack.callback(callback)


class LeaseTable:
    """All leases of one receiver that are not released yet. Thread-safe."""

    def __init__(self, incarnation: str, block_size: int, max_leases: int = 4096) -> None:
        """`incarnation` of the worker; `block_size` in tokens."""
        self.incarnation = incarnation
        self.block_size = block_size
        self.max_leases = max_leases
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}

    def grant(
        self,
        request_id: str,
        needed_start: int,
        needed_end: int,
        blocks: Sequence[int],
        on_released: Callback,
        attempt: int = 0,
    ) -> Lease:
        """Lease `blocks` for tokens [needed_start, needed_end); `on_released` is called exactly once, from any thread.

        Raises OverloadedError at `max_leases`, InternalError when range and blocks don't fit.
        """
        size = self.block_size
        wanted = -(-needed_end // size) - needed_start // size
        if not 0 <= needed_start <= needed_end or needed_start % size or len(blocks) != wanted:
            raise InternalError(f"{len(blocks)} blocks of {size} tokens for tokens [{needed_start}, {needed_end})")
        # Random over the whole range: a lease id must not be guessed, nor come again after a restart.
        lease_id = secrets.token_hex(16)

        def released() -> None:
            with self._lock:
                del self._leases[lease_id]
            on_released()

        lease = Lease(lease_id, request_id, attempt, (needed_start, needed_end), tuple(blocks), released)
        with self._lock:
            if len(self._leases) >= self.max_leases:
                raise OverloadedError(f"{self.max_leases} transfers are under way", reason="TOO_MANY_LEASES")
            self._leases[lease_id] = lease
        return lease

    def get(self, lease_id: str) -> Lease:
        """The lease, if it is not closed; NotFoundError otherwise."""
        with self._lock:
            lease = self._leases.get(lease_id)
        if lease is None or lease.state is LeaseState.CLOSED:
            raise NotFoundError(f"no lease {lease_id[:64]!r} here", reason="LEASE_UNKNOWN")
        return lease

    def close_all(self) -> None:
        """Close every lease, as at shutdown."""
        with self._lock:
            leases = list(self._leases.values())
        for lease in leases:
            lease.close()

    def __len__(self) -> int:
        """Leases not released yet, closed ones with a copy in flight included."""
        with self._lock:
            return len(self._leases)
