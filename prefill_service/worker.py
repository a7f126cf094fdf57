"""What the RPCs of one prefill worker share: the engine, the transports, the open calls, the load, the drain.

Belongs to the event loop. Life cycle: PrefillWorker(...) -> `start()` -> calls come and go -> `drain(grace)`: nothing
new is admitted, what can finish within the grace does, then the calls that are left end as DRAINING -> `stop()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.batch import StepRunner
from kv_transfer.layout import KvLayout, check_compatible
from kv_transfer.registry import choose
from kv_transfer.session import Sender, SendSession
from kv_transfer.transport import SourceTransport
from prefill_service.channels import Channels
from prefill_service.engine_loop import EngineLoop
from prefill_service.events import Event, Load
from prefill_service.identity import WorkerIdentity
from prefill_service.job import Job
from prefill_service.metrics import StepMetrics
from prefill_service.request import tokens_to_prefill
from prefill_service.scheduler import Scheduler
from prefill_service.sender import Transfer
from tandem.errors import ConfigError, DrainingError, InvalidRequestError
from tandem.record import Record
from tandem.service import address as addresses
from tandem.service.logging import get_logger

_log = get_logger(__name__)
SEND_THREADS = 4
LAST_WORDS_SECONDS = 2.0
"""How long the ends of drained calls may take to go out."""


@dataclass(frozen=True, slots=True)
class Target:
    """A lease that a decode worker granted, as the gateway tells of it."""

    lease_id: str
    attempt: int
    address: str
    incarnation: str
    needed_start: int
    needed_end: int
    layout: KvLayout
    transports: tuple[str, ...]


class PrefillWorker:
    """One prefill worker without its RPCs."""

    def __init__(
        self,
        identity: WorkerIdentity,
        scheduler: Scheduler,
        runner: StepRunner,
        transports: Mapping[str, SourceTransport],
        metrics: StepMetrics | None = None,
    ) -> None:
        """`transports` by name, best first; they become the worker's."""
        self.identity = identity
        self.metrics = metrics
        self.engine = EngineLoop(scheduler, runner, on_events=self._on_events, on_load=self._on_load, metrics=metrics)
        self.draining = False
        self.stopping = False
        self._transports = dict(transports)
        self._sender = Sender(identity.incarnation, identity.model_id, identity.numerics_id, identity.layout)
        self._channels = Channels()
        self._executor = ThreadPoolExecutor(SEND_THREADS, thread_name_prefix="kv-send")
        self._jobs: dict[str, Job] = {}
        self._watchers: set[asyncio.Event] = set()
        self._nobody = asyncio.Event()
        self._nobody.set()

    def start(self) -> None:
        """Start the engine thread."""
        self.engine.start()

    async def stop(self) -> None:
        """End everything at once; idempotent."""
        self.draining = self.stopping = True
        self._wake_watchers()
        for job in list(self._jobs.values()):
            job.fail(DrainingError("this prefill worker has stopped", retry_after=0.0))
            job.close()
            await job.closed()
        await self.engine.stop()
        await self._channels.close()
        await asyncio.to_thread(self._executor.shutdown, True, cancel_futures=True)
        for transport in self._transports.values():
            await asyncio.to_thread(transport.close)

    async def drain(self, grace: float) -> None:
        """Take nothing new, let calls finish for `grace` seconds, then end the rest as DRAINING; stop."""
        self.draining = True
        self._wake_watchers()
        if not await self._all_gone(grace):
            _log.info("handing requests back", requests=len(self._jobs))
            for job in list(self._jobs.values()):
                job.fail(DrainingError("this prefill worker is about to stop", retry_after=0.0))
            await self._all_gone(LAST_WORDS_SECONDS)
        await self.stop()

    def open_job(self, record: Record, target: Target) -> Job:
        """A place for a new request. Checks what can be checked before anything is computed or sent.

        Raises DrainingError, IncompatibleError (layouts, transports), InvalidRequestError (address, needed range).
        """
        if self.draining:
            raise DrainingError("this prefill worker takes nothing new: it is about to stop", retry_after=0.0)
        tokens = len(tokens_to_prefill(record))
        check_target(target, tokens)
        check_compatible(self.identity.layout, target.layout)
        session = SendSession(
            self._sender,
            self._transports[choose(list(self._transports), target.transports)],
            lease_id=target.lease_id,
            attempt=target.attempt,
            target_incarnation=target.incarnation,
        )
        transfer = Transfer(session, self._channels, target.address, self._executor, most_tokens=tokens)
        key = secrets.token_hex(12)
        job = self._jobs[key] = Job(key, record, transfer, self.metrics)
        self._nobody.clear()
        return job

    def close_job(self, job: Job) -> None:
        """The call is over, however it ended: free what it holds, here and on the way to the decode worker."""
        self._jobs.pop(job.key, None)
        self.engine.release(job.key)
        job.close()
        if not self._jobs:
            self._nobody.set()

    @property
    def open_jobs(self) -> int:
        """Calls aboard."""
        return len(self._jobs)

    @contextlib.contextmanager
    def watching(self) -> Iterator[asyncio.Event]:
        """An event that is set at every change of the load."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            yield event
        finally:
            self._watchers.discard(event)

    async def _all_gone(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._nobody.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _on_events(self, events: list[Event]) -> None:
        for event in events:
            if (job := self._jobs.get(event.key)) is not None:
                job.on_event(event)

    def _on_load(self, _load: Load) -> None:
        self._wake_watchers()

    def _wake_watchers(self) -> None:
        for event in self._watchers:
            event.set()


def check_target(target: Target, tokens: int) -> None:
    """Raises InvalidRequestError for a target that can't be; `tokens` is how many the request has to offer."""
    try:
        addresses.parse(target.address, flag="target.address")
    except ConfigError as exc:
        raise InvalidRequestError(exc.message, field="target.address") from exc
    if not target.lease_id:
        raise InvalidRequestError("target.lease_id is missing", field="target.lease_id")
    if not 0 <= target.needed_start <= target.needed_end <= tokens:
        raise InvalidRequestError(
            f"tokens [{target.needed_start}, {target.needed_end}) are needed, the request has {tokens}",
            field="target.needed_end",
        )
