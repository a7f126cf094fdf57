"""The queue: requests wait here, not in the workers, until a pair has credit.

Life cycle of a request: `acquire` (waits; by priority, then arrival) -> a `Ticket` that counts against the workers'
credit -> `release` however it ends.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from dataclasses import dataclass, field

from gateway.config import GatewayConfig
from gateway.pairing import Need, Pair, Pairing
from gateway.pool import WorkerPool
from gateway.workers import Worker
from tandem.errors import IncompatibleError, OverloadedError, UnavailableError


@dataclass(order=True)
class _Waiter:
    priority: int
    arrival: float
    order: int
    need: Need = field(compare=False)
    future: asyncio.Future[Ticket] = field(compare=False)


class Ticket:
    """Credit that a running request holds on its workers."""

    def __init__(self, pair: Pair, need: Need) -> None:
        """Takes the credit."""
        self.decode, self.prefill, self._need = pair.decode, pair.prefill, need
        self._prefills: list[Worker] = []
        self.decode.take(need.sequences, need.tokens, need.prefix)
        if self.prefill is not None:
            self.take_prefill(self.prefill)

    def take_prefill(self, worker: Worker) -> None:
        """Another prefill worker joined the request."""
        worker.take(1, self._need.tokens, self._need.prefix)
        self.prefill = worker
        self._prefills.append(worker)

    def give_prefill(self) -> None:
        """The prefill workers' part is over."""
        for worker in self._prefills:
            worker.give(1)
        self._prefills.clear()

    def release(self) -> None:
        """Everything is over."""
        self.give_prefill()
        self.decode.give(self._need.sequences)


class Dispatcher:
    """Belongs to the event loop."""

    def __init__(self, pool: WorkerPool, pairing: Pairing, config: GatewayConfig) -> None:
        """Listens to `pool` for credit that comes back."""
        self._pool, self._pairing, self._config = pool, pairing, config
        self._heap: list[_Waiter] = []
        self._queued_tokens = 0
        self._order = itertools.count()
        self._kick: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        pool.on_change(self._schedule)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._heap)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens of those requests."""
        return self._queued_tokens

    async def acquire(self, need: Need, *, priority: int, arrival: float, again: bool = False) -> Ticket:
        """Waits for a pair with credit. `again`: it had one before, and no bound of the queue sends it away now.

        Raises OverloadedError when the queue is full, UnavailableError when no worker comes in time, IncompatibleError
        when workers are there but can't work together.
        """
        if not self._heap and (ticket := self._try(need)) is not None:
            return ticket
        full = self.waiting >= self._config.max_queue or self._queued_tokens > self._config.max_queued_tokens
        if full and not again:
            raise OverloadedError(
                f"the queue is full: {self.waiting} requests with {self._queued_tokens} prompt tokens wait",
                retry_after=self._retry_after(),
                reason="QUEUE_FULL",
            )
        future: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(priority, arrival, next(self._order), need, future)
        heapq.heappush(self._heap, waiter)
        self._queued_tokens += need.tokens
        self._schedule()
        try:
            return await self._wait(waiter)
        except BaseException:
            # It may have got its ticket in the very step in which it was cancelled.
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release()
            raise
        finally:
            self._leave(waiter)

    async def _wait(self, waiter: _Waiter) -> Ticket:
        """Gives up after a while without any worker that could run it."""
        grace = self._config.patience.no_worker_grace
        loop = asyncio.get_running_loop()
        alone_since = loop.time()
        while True:
            await asyncio.wait({waiter.future}, timeout=min(1.0, grace / 4))
            if waiter.future.done():
                return waiter.future.result()
            self._schedule()
            if self._pairing.candidates(waiter.need):
                alone_since = loop.time()
            elif loop.time() - alone_since >= grace:
                raise UnavailableError("no decode worker is ready", retry_after=2.0, reason="NO_WORKER")

    def _leave(self, waiter: _Waiter) -> None:
        if waiter in self._heap:
            self._heap.remove(waiter)
            heapq.heapify(self._heap)
        self._queued_tokens -= waiter.need.tokens
        waiter.future.cancel()

    def _try(self, need: Need) -> Ticket | None:
        pair = self._pairing.choose(need, asyncio.get_running_loop().time())
        return Ticket(pair, need) if pair else None

    def _schedule(self) -> None:
        """Serves the queue at the end of this turn of the loop, once."""
        if self._heap and self._kick is None:
            self._kick = asyncio.get_running_loop().call_later(0, self._serve)

    def _serve(self) -> None:
        """Gives tickets in order. Who waits for credit holds up those behind; who has no worker at all doesn't."""
        self._kick = None
        self._forget_retry()
        for waiter in sorted(self._heap):
            if waiter.future.done():
                continue
            try:
                ticket = self._try(waiter.need)
                blocked = ticket is None and bool(self._pairing.candidates(waiter.need))
            except IncompatibleError as exc:
                waiter.future.set_exception(exc)
                continue
            if ticket is not None:
                waiter.future.set_result(ticket)
            elif blocked:
                self._retry_paused()
                break
        self._heap = [waiter for waiter in self._heap if not waiter.future.done()]
        heapq.heapify(self._heap)

    def _retry_paused(self) -> None:
        """A worker that refused has credit again after its pause, without any report."""
        loop = asyncio.get_running_loop()
        pauses = [w.paused_until for w in (*self._pool.prefill, *self._pool.decode) if w.paused_until > loop.time()]
        if pauses:
            # Apart from `_kick`: credit that comes back elsewhere meanwhile is given out at once.
            self._retry = loop.call_at(min(pauses), self._schedule)

    def _forget_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _retry_after(self) -> float:
        """Seconds until the queue has probably moved on, from what the prefill workers report."""
        workers = [w for w in (self._pool.prefill or self._pool.decode) if w.ready]
        rate = sum(w.load.prefill_tokens_per_second for w in workers)
        return min(60.0, max(1.0, self._queued_tokens / rate)) if rate else 1.0
