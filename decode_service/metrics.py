"""What the engine thread tells Prometheus, under the field's names (`tandem.service.metrics`)."""

from __future__ import annotations

from decode_service.events import Load
from decode_service.scheduler import Scheduler
from engine.batch import Batch
from tandem.service.metrics import Metrics


class StepMetrics:
    """Turns the scheduler's counters into metrics. Called on the engine thread only."""

    def __init__(self, metrics: Metrics) -> None:
        """`metrics` is the process's own."""
        self._metrics = metrics
        self._step_seconds = metrics.histogram("engine_step_seconds", "Time of an engine step.")
        self._cancelled = metrics.counter("requests_cancelled", "Requests that were cancelled.")
        self._late_steps = metrics.counter(
            "steps_after_cancel", "Steps that cancelled requests took part in although launched after the cancel."
        )
        self._worst_late_steps = metrics.gauge(
            "steps_after_cancel_max", "The most steps that one cancelled request took part in after its cancel."
        )
        self._checks = metrics.counter("integrity_checks", "Checks of the block pool's books, when idle.")
        self._failed_checks = metrics.counter("integrity_failures", "Checks that found the books wrong: our own bug.")
        self._seen = (0, 0, 0, 0, 0, 0, 0, 0)

    def step(self, batch: Batch, seconds: float) -> None:
        """One step is over."""
        self._metrics.iteration_tokens_total.observe(batch.num_tokens)
        self._step_seconds.observe(seconds)

    def checked(self, right: bool) -> None:
        """The books were checked."""
        self._checks.inc()
        if not right:
            self._failed_checks.inc()

    def observe(self, load: Load, scheduler: Scheduler) -> None:
        """Sets the gauges and adds what was counted since the last call."""
        metrics, counters, pool = self._metrics, scheduler.counters, scheduler.pool.stats
        metrics.num_requests_running.set(load.running_sequences)
        metrics.num_requests_waiting.set(load.waiting_requests + load.receiving_requests)
        metrics.kv_cache_usage_perc.set(1 - load.free_blocks / load.total_blocks)
        self._worst_late_steps.set(counters.worst_steps_after_cancel)
        size = scheduler.pool.block_size
        now = (
            counters.prompt_tokens,
            counters.cached_tokens,
            counters.generated_tokens,
            counters.preemptions,
            counters.cancelled,
            counters.steps_after_cancel,
            pool.queried_blocks * size,
            pool.hit_blocks * size,
        )
        targets = (
            metrics.prompt_tokens,
            metrics.prompt_tokens_cached,
            metrics.generation_tokens,
            metrics.num_preemptions,
            self._cancelled,
            self._late_steps,
            metrics.prefix_cache_queries,
            metrics.prefix_cache_hits,
        )
        for target, value, before in zip(targets, now, self._seen, strict=True):
            if value > before:
                target.inc(value - before)
        self._seen = now

    def transferred(self, size: int, seconds: float) -> None:
        """A transfer was committed. On the event loop."""
        self._metrics.nixl_bytes_transferred.inc(size)
        self._metrics.nixl_xfer_time_seconds.observe(seconds)

    def transfer_failed(self) -> None:
        """A transfer ended without a commit. On the event loop."""
        self._metrics.nixl_num_failed_transfers.inc()
