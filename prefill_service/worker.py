"""What the RPCs of one prefill worker share: the engine, the transports, the open jobs. See `worker.worker`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.batch import StepRunner
from kv_transfer.registry import choose
from kv_transfer.session import Sender, SendSession
from kv_transfer.transport import SourceTransport
from prefill_service.channels import Channels
from prefill_service.engine_loop import EngineLoop
from prefill_service.events import Event
from prefill_service.job import Job
from prefill_service.metrics import StepMetrics
from prefill_service.request import tokens_to_prefill
from prefill_service.scheduler import Scheduler
from prefill_service.sender import Transfer
from tandem.errors import ConfigError, InvalidRequestError
from tandem.kv_layout import KvLayout, check_pair
from tandem.record import Record
from tandem.service import address as addresses
from tandem.service.tls import Tls
from worker.identity import WorkerIdentity
from worker.worker import Worker

SEND_THREADS = 4


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
    convert_kv_dtype: bool = False
    host_id: str = ""


class PrefillWorker(Worker[Job]):
    """One prefill worker without its RPCs."""

    role = "prefill"
    engine: EngineLoop

    def __init__(
        self,
        identity: WorkerIdentity,
        scheduler: Scheduler,
        runner: StepRunner,
        transports: Mapping[str, SourceTransport],
        metrics: StepMetrics | None = None,
        tls: Tls | None = None,
    ) -> None:
        """`transports` by name, best first; they become the worker's. `tls`: how to call decode workers."""
        super().__init__(identity)
        self.metrics = metrics
        self.engine = EngineLoop(
            "prefill-engine", scheduler, runner, on_events=self._on_events, on_load=self._on_load, metrics=metrics
        )
        if metrics is not None:
            metrics.watch_backlog(lambda: self.engine.load.queued_prefill_tokens, lambda: self.engine.prefill_rate)
        self._transports = dict(transports)
        self._sender = Sender(identity.incarnation, identity.model_id, identity.numerics_id, identity.layout)
        self._channels = Channels(tls=tls)
        self._executor = ThreadPoolExecutor(SEND_THREADS, thread_name_prefix="kv-send")

    async def stop(self) -> None:
        """End everything at once; idempotent."""
        self.draining = self.stopping = True
        self._wake_watchers()
        for job in list(self._calls.values()):
            job.fail(self.stopped_error())
            job.close()
            await job.closed()
        await self.engine.stop()
        await self._channels.close()
        await asyncio.to_thread(self._executor.shutdown, True, cancel_futures=True)
        for transport in self._transports.values():
            await asyncio.to_thread(transport.close)

    def open_job(self, record: Record, target: Target) -> Job:
        """A place for a new request. Checks what can be checked before anything is computed or sent.

        Raises DrainingError, IncompatibleError (layouts, transports), InvalidRequestError (address, needed range).
        """
        self.check_open()
        tokens = len(tokens_to_prefill(record))
        check_target(target, tokens)
        check_pair(self.identity.layout, target.layout, convert_dtype=target.convert_kv_dtype)
        session = SendSession(
            self._sender,
            self._transports[self._transport_to(target)],
            lease_id=target.lease_id,
            attempt=target.attempt,
            target_incarnation=target.incarnation,
        )
        transfer = Transfer(session, self._channels, target.address, self._executor, most_tokens=tokens)
        job = Job(self._new_key(), record, transfer, self.metrics)
        self._enter(job.key, job)
        return job

    def _transport_to(self, target: Target) -> str:
        here, there = self.identity.host_id, target.host_id
        return choose(list(self._transports), target.transports, one_host=not here or not there or here == there)

    def close_job(self, job: Job) -> None:
        """The call is over, however it ended: free what it holds, here and on the way to the decode worker."""
        self._leave(job.key)
        self.engine.release(job.key)
        job.close()

    def _on_events(self, events: list[Event]) -> None:
        for event in events:
            if (job := self._calls.get(event.key)) is not None:
                job.on_event(event)


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
