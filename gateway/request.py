"""One request from the queue to its last event, over as many workers as it takes.

Life cycle: `RequestRun(...)` -> `run()`: replay what the client has of a stream that broke off -> wait for a pair ->
`Attempt` -> on `DecodeLost` again from the record, within a budget of migrations and of workers that died -> usage and
timings. Cancel the task of `run` to cancel the request: both RPCs end at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from gateway.affinity import Prefix
from gateway.attempt import Attempt, DecodeLost
from gateway.config import GatewayConfig
from gateway.dispatch import Dispatcher
from gateway.ended import FeedLostError
from gateway.outputs import Outputs
from gateway.pairing import Need, Pairing
from gateway.plain import Admitted, Counted, Delta, Event, Finished, Job
from gateway.tokenizer import Tokenizer
from gateway.workers import Worker
from tandem.errors import (
    DeadlineError,
    DrainingError,
    IncompatibleError,
    InternalError,
    OverloadedError,
    RequestCancelledError,
    StaleError,
    TandemError,
    UnavailableError,
)
from tandem.service.logging import get_logger
from tandem.service.metrics import Metrics
from tandem.service.status import code_of

_log = get_logger(__name__)

INLINE_TOKENS = 1024
"""Replaying this many tokens takes a few milliseconds."""


@dataclass(frozen=True)
class Services:
    """What every request uses."""

    config: GatewayConfig
    dispatcher: Dispatcher
    pairing: Pairing
    tokenizer: Tokenizer
    metrics: Metrics


class RequestRun:
    """See the module's life cycle."""

    def __init__(self, job: Job, services: Services, publish: Callable[[Event], None]) -> None:
        """`publish` gets every event in order; what it raises ends the request."""
        self._job, self._services, self._publish = job, services, publish
        self._outputs = Outputs(job, services.tokenizer)
        sequences = job.sampling.n
        self._need = Need(len(job.prompt), sequences, Prefix(job.prompt, job.cache_scope))
        self._dead: set[str] = set()
        """Incarnations that were lost with the request aboard."""
        self._failed: set[str] = set()
        """Those of them whose engine failed, as they said themselves."""
        self._lost = 0
        self._told = False
        self._lacking: list[Delta | Finished] = []
        """What the client of a resumed request lacks of the tokens that it has: told once a worker is found."""
        self._restored = 0
        """Tokens that the client had before."""
        self._now = asyncio.get_running_loop().time
        self._opened = self._first = self._last = 0.0
        self._last_of: dict[int, float] = {}
        self.counted = Counted(prompt_tokens=len(job.prompt))

    async def run(self) -> None:
        """Raises a TandemError for the client."""
        try:
            await self._run()
        except TandemError as exc:
            self._services.metrics.request_failure.inc(code=code_of(exc).name)
            raise

    async def _run(self) -> None:
        metrics = self._services.metrics
        try:
            async with asyncio.timeout_at(self._job.deadline):
                await self._restore()
                while not (self._told and self._outputs.done):
                    await self._once()
        except TimeoutError as exc:
            raise DeadlineError("the request's deadline passed") from exc
        finally:
            self._count()
            metrics.generation_tokens.inc(self.counted.completion_tokens - self._restored)
        self._observe()
        self._publish(self.counted)

    async def _restore(self) -> None:
        """Replays what another gateway gave out; long outputs in a thread."""
        resumed = self._job.resumed
        if resumed is None or not resumed.outputs:
            return
        self._need = replace(self._need, model_id=resumed.model_id, numerics_id=resumed.numerics_id)
        if sum(len(output.token_ids) for output in resumed.outputs) > INLINE_TOKENS:
            self._lacking = await asyncio.to_thread(self._outputs.restore, resumed.outputs)
        else:
            self._lacking = self._outputs.restore(resumed.outputs)
        self._restored = self._outputs.num_tokens

    def _over_already(self, worker: Worker) -> bool:
        """True when a resumed request needs no more tokens, only its end."""
        if self._told or not self._restored:
            return False
        self._lacking += self._outputs.finish_complete(set(worker.info.eos_token_ids))
        return self._outputs.done

    async def _once(self) -> None:
        """One decode worker."""
        job, services = self._job, self._services
        self._forgive()
        services.metrics.num_requests_waiting.inc()
        try:
            ticket = await services.dispatcher.acquire(
                self._need, priority=job.priority, arrival=job.arrival, again=bool(self._opened)
            )
        finally:
            services.metrics.num_requests_waiting.dec()
        if not self._opened:
            self._opened = self._now()
        if self._over_already(ticket.decode):
            ticket.release()
            self._on_admitted(ticket.decode)
            return
        attempt = Attempt(
            job,
            ticket,
            self._outputs,
            self._need,
            pairing=services.pairing,
            patience=services.config.patience,
            counted=self.counted,
            publish=self._on_event,
            admitted=self._on_admitted,
            prefill_died=self._died,
        )
        running = services.metrics.num_requests_running
        running.inc()
        try:
            await attempt.run()
        except DecodeLost as lost:
            self._on_lost(lost)
        finally:
            running.dec()

    def _on_admitted(self, worker: Worker) -> None:
        """From here on only a worker that computes the same bits may go on."""
        self._need = replace(self._need, model_id=worker.info.model_id, numerics_id=worker.info.numerics_id)
        if not self._told:
            self._told = True
            self._publish(Admitted(worker.info.model_name, worker.info.model_id, worker.info.numerics_id))
            for event in self._lacking:
                self._publish(event)

    def _on_event(self, event: Delta | Finished) -> None:
        if isinstance(event, Delta) and event.token_ids:
            self._on_tokens(event.index, len(event.token_ids))
        self._publish(event)

    def _on_tokens(self, index: int, count: int) -> None:
        now, metrics = self._now(), self._services.metrics
        if not self._first:
            self._first = now
            if not self._restored:
                metrics.time_to_first_token_seconds.observe(now - self._job.started)
        if (last := self._last_of.get(index)) is not None:
            metrics.inter_token_latency_seconds.observe((now - last) / count)
        self._last = self._last_of[index] = now

    def _on_lost(self, lost: DecodeLost) -> None:
        """Decides whether the request goes on elsewhere; raises when it doesn't."""
        worker, error = lost.worker, lost.ended.error
        assert error is not None
        if isinstance(error, OverloadedError) and not lost.admitted:
            if error.retry_after is None:
                raise error
            worker.refused(self._now() + self._services.config.patience.refused_pause)
            return
        self._publish_complete(worker)
        if isinstance(error, DrainingError):
            worker.draining = True
            self.counted.migrations += int(lost.heard)
            return
        if isinstance(error, (StaleError, FeedLostError)):  # nothing against the worker, once it reports again
            worker.failed()
            if lost.heard or isinstance(error, StaleError):
                self.counted.migrations += int(lost.heard)
                self._spend(lost)
            return
        if not _may_move(lost):
            raise error
        self._migrate(lost)

    def _publish_complete(self, worker: Worker) -> None:
        for event in self._outputs.finish_complete(set(worker.info.eos_token_ids)):
            self._publish(event)

    def _migrate(self, lost: DecodeLost) -> None:
        worker, error = lost.worker, lost.ended.error
        _log.warning("decode worker lost", address=worker.address, error=str(error), died=lost.ended.died)
        self._need = replace(self._need, avoid=self._need.avoid | {worker.info.incarnation})
        if self._outputs.done:
            return
        self.counted.migrations += int(lost.heard)
        if lost.ended.died or isinstance(error, (InternalError, UnavailableError)):
            worker.fault(str(error), died=lost.ended.died)
        if isinstance(error, InternalError) and not lost.ended.died:
            if not self._services.pairing.candidates(self._need):
                raise error
            self._failed.add(worker.info.incarnation)
        elif lost.ended.died:
            worker.failed()
        if lost.heard and (lost.ended.died or isinstance(error, InternalError)):
            self._died(worker)
        self._spend(lost)

    def _spend(self, lost: DecodeLost) -> None:
        """Migrations have a budget, so that one request can't take a pool down."""
        self._lost += 1
        if self._lost > self._services.config.patience.max_migrations:
            raise InternalError(f"the request lost {self._lost} decode workers; the last said: {lost}")

    def _died(self, worker: Worker) -> None:
        """A request that was aboard several workers that died is taken for the cause."""
        self._dead.add(worker.info.incarnation)
        # Who is heard of again did not die: the way to it broke. But an engine that failed is no better for answering.
        dead = self._dead - (self._services.pairing.alive() - self._failed)
        if len(dead) >= self._services.config.patience.max_deaths:
            raise InternalError(f"the request was aboard {len(dead)} workers that died", reason="POISON_REQUEST")

    def _forgive(self) -> None:
        """Where nobody else is left, workers that were lost may go on with the request once they are heard of again."""
        lost = self._need.avoid - self._failed
        if lost and not self._services.pairing.candidates(self._need):
            self._need = replace(self._need, avoid=self._need.avoid - lost)

    def _count(self) -> None:
        counted, job, now = self.counted, self._job, self._now()
        counted.completion_tokens = self._outputs.num_tokens
        counted.total_seconds = now - job.started
        counted.queue_seconds = (self._opened or now) - job.started
        if self._first:
            counted.prefill_seconds = self._first - self._opened
            counted.time_to_first_token_seconds = self._first - job.started
            counted.decode_seconds = self._last - self._first

    def _observe(self) -> None:
        metrics, counted = self._services.metrics, self.counted
        metrics.prompt_tokens.inc(counted.prompt_tokens)
        metrics.prompt_tokens_cached.inc(counted.cached_tokens)
        metrics.prefix_cache_queries.inc(counted.prompt_tokens)
        metrics.prefix_cache_hits.inc(counted.cached_tokens)
        metrics.num_preemptions.inc(counted.preemptions)
        metrics.e2e_request_latency_seconds.observe(counted.total_seconds)
        metrics.request_queue_time_seconds.observe(counted.queue_seconds)
        metrics.request_prefill_time_seconds.observe(counted.prefill_seconds)
        metrics.request_decode_time_seconds.observe(counted.decode_seconds)
        metrics.request_prompt_tokens.observe(counted.prompt_tokens)
        metrics.request_generation_tokens.observe(counted.completion_tokens)
        for choice in self._outputs.choices:
            assert choice.reason is not None
            metrics.request_success.inc(finished_reason=choice.reason.value)


def _may_move(lost: DecodeLost) -> bool:
    """True for failures of the worker; what is wrong with the request itself goes to the client."""
    if lost.ended.died:
        return True
    movable = (UnavailableError, InternalError, OverloadedError, RequestCancelledError)
    return isinstance(lost.ended.error, movable) and not isinstance(lost.ended.error, IncompatibleError)
