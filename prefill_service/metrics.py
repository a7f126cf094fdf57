"""What a prefill worker tells Prometheus, under the field's names (`tandem.service.metrics`)."""

from __future__ import annotations

from engine.batch import Batch
from prefill_service.events import Counters, Load
from tandem.service.metrics import Metrics


class StepMetrics:
    """Turns counters into metrics. `step` and `observe` on the engine thread, the rest on the event loop."""

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
        self._queued = metrics.gauge("queued_prefill_tokens", "Prompt tokens accepted and not yet computed.")
        self._sending = metrics.gauge("num_requests_sending", "Requests computed and held until the transfer is over.")
        self._seen = (0,) * 7

    def step(self, batch: Batch, seconds: float) -> None:
        """One step is over."""
        self._metrics.iteration_tokens_total.observe(batch.num_tokens)
        self._step_seconds.observe(seconds)

    def checked(self, right: bool) -> None:
        """The books were checked."""
        self._checks.inc()
        if not right:
            self._failed_checks.inc()

    def observe(self, load: Load, counters: Counters) -> None:
        """Sets the gauges and adds what was counted since the last call."""
        metrics = self._metrics
        metrics.num_requests_running.set(load.running_requests)
        metrics.num_requests_waiting.set(load.waiting_requests)
        metrics.kv_cache_usage_perc.set(1 - load.free_blocks / load.total_blocks)
        self._worst_late_steps.set(counters.worst_steps_after_cancel)
        self._queued.set(load.queued_prefill_tokens)
        self._sending.set(load.sending_requests)
        now = (
            counters.prompt_tokens,
            counters.cached_tokens,
            counters.cached_tokens,
            counters.queried_tokens,
            counters.generated_tokens,
            counters.cancelled,
            counters.steps_after_cancel,
        )
        targets = (
            metrics.prompt_tokens,
            metrics.prompt_tokens_cached,
            metrics.prefix_cache_hits,
            metrics.prefix_cache_queries,
            metrics.generation_tokens,
            self._cancelled,
            self._late_steps,
        )
        for target, value, before in zip(targets, now, self._seen, strict=True):
            if value > before:
                target.inc(value - before)
        self._seen = now

    def started(self, prompt_tokens: int, queued_seconds: float) -> None:
        """A request left the queue."""
        self._metrics.request_prompt_tokens.observe(prompt_tokens)
        self._metrics.request_queue_time_seconds.observe(queued_seconds)

    def prefilled(self, seconds: float, seconds_since_start: float) -> None:
        """First tokens are there: `seconds` after the request came, `seconds_since_start` after it left the queue."""
        self._metrics.time_to_first_token_seconds.observe(seconds)
        self._metrics.request_prefill_time_seconds.observe(seconds_since_start)

    def transferred(self, size: int, seconds: float) -> None:
        """A transfer was committed: the request's end here. Dashboards know a prefill's end as "length"."""
        self._metrics.nixl_bytes_transferred.inc(size)
        self._metrics.nixl_xfer_time_seconds.observe(seconds)
        self._metrics.request_success.inc(finished_reason="length")

    def transfer_failed(self) -> None:
        """A transfer ended with an error."""
        self._metrics.nixl_num_failed_transfers.inc()

    def expired(self) -> None:
        """A request ended before its transfer did: cancelled, or out of time."""
        self._metrics.nixl_num_kv_expired_reqs.inc()
