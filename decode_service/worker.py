"""What the servicers of one decode worker share: the engine, the leases, the open streams, the load, the drain.

Belongs to the event loop. Life cycle: DecodeWorker(...) -> `start()` -> streams come and go -> `drain(grace)`: nothing
new is admitted, what can finish within the grace does, then the streams that are left end as DRAINING -> `stop()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from decode_service.engine_loop import EngineLoop
from decode_service.events import Admission, Event, Load
from decode_service.metrics import StepMetrics
from decode_service.scheduler import Scheduler
from decode_service.streams import DEFAULT_LIMIT, OutputStream
from engine.batch import StepRunner
from kv_transfer.layout import KvLayout
from kv_transfer.leases import Lease, LeaseTable
from kv_transfer.pool import PoolMemory
from tandem.errors import DrainingError, NotFoundError, StaleError, TandemError
from tandem.service.logging import get_logger

_log = get_logger(__name__)
HEARTBEAT_SECONDS = 1.0
LAST_WORDS_SECONDS = 2.0
"""How long the ends of drained streams may take to go out."""


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """What a decode worker is, for its info RPC and its checks. Fixed for the life of its process."""

    incarnation: str
    model_id: str
    model_name: str
    layout: KvLayout
    numerics_id: str
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    transports: tuple[str, ...]
    total_blocks: int
    max_sequences: int
    architecture: str = ""
    quantization: str = ""
    metrics_address: str = ""

    def check_incarnation(self, meant: str) -> None:
        """Raises StaleError for a message to an earlier life of this address."""
        if meant != self.incarnation:
            raise StaleError(
                f"meant for incarnation {meant[:64]!r}, this is {self.incarnation!r}", reason="STALE_INCARNATION"
            )


class DecodeWorker:
    """One decode worker without its RPCs."""

    def __init__(
        self,
        identity: WorkerIdentity,
        scheduler: Scheduler,
        runner: StepRunner,
        pool_memory: PoolMemory,
        *,
        metrics: StepMetrics | None = None,
        stream_limit: int = DEFAULT_LIMIT,
    ) -> None:
        """`pool_memory` is the KV cache's memory, into which transfers copy. `stream_limit` is in tokens per client."""
        self.identity = identity
        self.pool_memory = pool_memory
        self.metrics = metrics
        self.leases = LeaseTable(identity.incarnation, scheduler.pool.block_size)
        self.engine = EngineLoop(scheduler, runner, on_events=self._on_events, on_load=self._on_load, metrics=metrics)
        self.draining = False
        self.stopping = False
        self._stream_limit = stream_limit
        self._streams: dict[str, OutputStream] = {}
        self._keys: dict[str, str] = {}
        self._transfers: dict[str, set[asyncio.Future[None]]] = {}
        self._watchers: set[asyncio.Event] = set()
        self._nobody = asyncio.Event()
        self._nobody.set()
        self._pulse_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the engine thread and the heartbeats."""
        self.engine.start()
        self._pulse_task = asyncio.create_task(self._pulse())

    async def stop(self) -> None:
        """End everything at once; idempotent."""
        self.draining = self.stopping = True
        self._on_load(self.engine.load)
        if self._pulse_task is not None:
            self._pulse_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pulse_task
            self._pulse_task = None
        self.leases.close_all()
        await self.engine.stop()

    async def drain(self, grace: float) -> None:
        """Take nothing new, let requests finish for `grace` seconds, then end the rest as DRAINING; stop."""
        self.draining = True
        self._on_load(self.engine.load)
        if not await self._all_gone(grace):
            _log.info("handing requests back", requests=len(self._streams))
            for stream in list(self._streams.values()):
                stream.fail(DrainingError("this decode worker is about to stop", retry_after=0.0))
            await self._all_gone(LAST_WORDS_SECONDS)
        await self.stop()

    def open_stream(self) -> tuple[str, OutputStream]:
        """A place for a new request's output and its key. Raises DrainingError."""
        if self.draining:
            raise DrainingError("this decode worker takes nothing new: it is about to stop", retry_after=0.0)
        key = secrets.token_hex(12)
        stream = self._streams[key] = OutputStream(self._stream_limit)
        self._nobody.clear()
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
    def transferring(self, lease: Lease) -> Iterator[asyncio.Future[None]]:
        """Around a transfer: a future that fails when the lease or the attempt ends, so a silent sender goes."""
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
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
                over.set_exception(StaleError("the attempt is over", reason="ATTEMPT_SUPERSEDED"))
                over.exception()  # retrieved: the transfer may end before it looks

    def fail_stream(self, key: str, error: TandemError) -> None:
        """End a request's stream with an error."""
        if (stream := self._streams.get(key)) is not None:
            stream.fail(error)

    def close_stream(self, key: str, lease: Lease | None) -> None:
        """The RPC is over: free what the request holds."""
        stream = self._streams.pop(key, None)
        if stream is not None and not stream.ended:
            self.engine.cancel(key)
        if lease is not None:
            lease.close()
            self._keys.pop(lease.lease_id, None)
            self.end_transfers(lease)
        else:
            # Without a lease no copy can be in flight, not even when the admission was overtaken by the end.
            self.engine.post(lambda scheduler: scheduler.release(key))
        if not self._streams:
            self._nobody.set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[asyncio.Event]:
        """An event that is set at every change of the load."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            yield event
        finally:
            self._watchers.discard(event)

    @property
    def open_streams(self) -> int:
        """Requests aboard."""
        return len(self._streams)

    async def _all_gone(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._nobody.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _on_events(self, events: list[Event]) -> None:
        for event in events:
            if (stream := self._streams.get(event.key)) is not None:
                stream.put(event)

    def _on_load(self, _load: Load) -> None:
        for event in self._watchers:
            event.set()

    async def _pulse(self) -> None:
        """Heartbeats for every stream, as long as the engine turns."""
        while True:
            if self.engine.alive:
                for stream in self._streams.values():
                    stream.pulse(self.engine.steps)
            await asyncio.sleep(HEARTBEAT_SECONDS)
