"""What the servicers of one decode worker share: the engine, the leases, the open streams. See `worker.worker`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from decode_service.engine_loop import EngineLoop
from decode_service.events import Admission, Event, Tokens
from decode_service.feeds import Feeds
from decode_service.metrics import StepMetrics
from decode_service.scheduler import Scheduler
from decode_service.streams import DEFAULT_LIMIT, OutputStream
from engine.batch import StepRunner
from kv_transfer.leases import Lease, LeaseTable
from kv_transfer.pool import PoolMemory
from tandem.errors import NotFoundError, StaleError, TandemError
from worker.identity import WorkerIdentity
from worker.worker import Worker

HEARTBEAT_SECONDS = 1.0


class DecodeWorker(Worker[OutputStream]):
    """One decode worker without its RPCs."""

    role = "decode"
    engine: EngineLoop

    def __init__(
        self,
        identity: WorkerIdentity,
        scheduler: Scheduler,
        runner: StepRunner,
        pool_memory: PoolMemory,
        other_pools: Sequence[PoolMemory] = (),
        *,
        metrics: StepMetrics | None = None,
        stream_limit: int = DEFAULT_LIMIT,
    ) -> None:
        """`pool_memory` is the KV cache's memory, into which transfers copy; `other_pools` that of rank 1 and up.
        `stream_limit` is in tokens per client.
        """
        super().__init__(identity)
        self.pool_memory, self.other_pools = pool_memory, tuple(other_pools)
        self.metrics = metrics
        self.leases = LeaseTable(identity.incarnation, scheduler.pool.block_size)
        self.engine = EngineLoop(
            "decode-engine", scheduler, runner, on_events=self._on_events, on_load=self._on_load, metrics=metrics
        )
        self._stream_limit = stream_limit
        self.feeds = Feeds()
        self._keys: dict[str, str] = {}
        """Requests of leases, as long as their streams are open."""
        self._transfers: dict[str, set[asyncio.Future[None]]] = {}
        self._pulse_task: asyncio.Task[None] | None = None
        if metrics is not None:
            metrics.watch_leases(lambda: len(self.leases), lambda: max(0, len(self.leases) - len(self._keys)))

    def start(self) -> None:
        """Start the engine thread and the heartbeats."""
        super().start()
        self._pulse_task = asyncio.create_task(self._pulse())

    async def stop(self) -> None:
        """End everything at once; idempotent."""
        self.draining = self.stopping = True
        self._wake_watchers()
        if self._pulse_task is not None:
            self._pulse_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pulse_task
            self._pulse_task = None
        self.leases.close_all()
        await self.engine.stop()
        self.feeds.close(self.stopped_error())  # behind the last tokens

    def open_stream(self, feed_id: str = "", feed_number: int = 0) -> tuple[str, OutputStream]:
        """A place for a new request's output and its key; tokens go to the feed while it is open. Raises
        DrainingError.
        """
        self.check_open()
        key, stream = self._new_key(), OutputStream(self._stream_limit, feed_id, feed_number)
        self._enter(key, stream)
        return key, stream

    def grant(self, key: str, admitted: Admission, request_id: str, attempt: int) -> Lease:
        """Lease the blocks of a request that receives. They are freed when it is closed and no copy is in flight."""

        def released() -> None:
            self.engine.post(lambda scheduler: scheduler.release(key))

        lease = self.leases.grant(
            request_id, admitted.needed_start, admitted.needed_end, admitted.blocks, released, attempt
        )
        self._keys[lease.lease_id] = key
        return lease

    def key_of(self, lease: Lease) -> str:
        """The request that a lease belongs to. Raises NotFoundError when its stream has ended."""
        key = self._keys.get(lease.lease_id)
        if key is None:
            raise NotFoundError("the request has ended", reason="LEASE_UNKNOWN")
        return key

    @contextlib.contextmanager
    def transferring(self, lease: Lease, attempt: int) -> Iterator[asyncio.Future[None]]:
        """Around a transfer: a future that fails when the lease or the attempt ends, so a silent sender goes."""
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not lease.is_current(attempt):
            _end(over)  # it ended while the transfer opened
        self._transfers.setdefault(lease.lease_id, set()).add(over)
        try:
            yield over
        finally:
            over.cancel()
            transfers = self._transfers.get(lease.lease_id, set())
            transfers.discard(over)
            if not transfers:
                self._transfers.pop(lease.lease_id, None)

    def end_transfers(self, lease: Lease) -> None:
        """The lease is closed or at another attempt: whoever transfers for it is told."""
        for over in self._transfers.get(lease.lease_id, ()):
            if not over.done():
                _end(over)

    def fail_stream(self, key: str, error: TandemError) -> None:
        """End a request's stream with an error, unless the request is over and only its end is to be written."""
        if (stream := self._calls.get(key)) is not None and not stream.ended:
            stream.fail(error)

    def close_stream(self, key: str, lease: Lease | None) -> None:
        """The RPC is over: free what the request holds."""
        stream = self._leave(key)
        if stream is not None and not stream.ended:
            self.engine.cancel(key)
        if lease is not None:
            lease.close()
            self._keys.pop(lease.lease_id, None)
            self.end_transfers(lease)
        else:
            # Without a lease no copy can be in flight, not even when the admission was overtaken by the end.
            self.engine.post(lambda scheduler: scheduler.release(key))

    def _on_events(self, events: list[Event]) -> None:
        for event in events:
            if (stream := self._calls.get(event.key)) is None:
                continue
            if isinstance(event, Tokens) and (feed := self.feeds.get(stream.feed_id)) is not None:
                if not stream.failed.done():
                    feed.put(stream.feed_number, event.deltas)
            else:
                stream.put(event)

    async def _pulse(self) -> None:
        """Heartbeats for every stream, as long as the engine turns."""
        while True:
            if self.engine.alive:
                for stream in self._calls.values():
                    stream.pulse(self.engine.steps)
            await asyncio.sleep(HEARTBEAT_SECONDS)


def _end(over: asyncio.Future[None]) -> None:
    over.set_exception(StaleError("the attempt is over", reason="ATTEMPT_SUPERSEDED"))
    over.exception()  # retrieved: the transfer may end before it looks
