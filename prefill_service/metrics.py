"""What a prefill worker tells Prometheus, under the field's names (`tandem.service.metrics`)."""

from __future__ import annotations

from collections.abc import Callable

from prefill_service.events import Load
from prefill_service.scheduler import Scheduler
from tandem.service.metrics import Metrics
from worker import metrics


class StepMetrics(metrics.StepMetrics):
    """Turns counters into metrics. What isn't said to be for the engine thread is for the event loop."""

    def __init__(self, metrics: Metrics) -> None:
        """`metrics` is the process's own."""
        super().__init__(metrics)
        self._queued = metrics.gauge("queued_prefill_tokens", "Prompt tokens accepted and not yet computed.")
        self._sending = metrics.gauge("num_requests_sending", "Requests computed and held until the transfer is over.")

    def watch_backlog(self, queued: Callable[[], int], rate: Callable[[], float]) -> None:
        """Prompt tokens that wait and tokens computed a second (0: not measured yet), asked at each scrape."""
        speed = self._metrics.gauge("prefill_tokens_per_second", "Prompt tokens computed a second in recent steps.")
        backlog = self._metrics.gauge("queued_prefill_seconds", "Queued prompt tokens at that rate; 0 until measured.")
        speed.set_function(rate)
        backlog.set_function(lambda: queued() / measured if (measured := rate()) else 0.0)

    def observe(self, load: Load, scheduler: Scheduler) -> None:
        """Sets the gauges and adds what was counted since the last call."""
        metrics, counters = self._metrics, scheduler.counters
        metrics.num_requests_running.set(load.running_requests)
        metrics.num_requests_waiting.set(load.waiting_requests)
        metrics.kv_cache_usage_perc.set(1 - load.free_blocks / load.total_blocks)
        self._queued.set(load.queued_prefill_tokens)
        self._sending.set(load.sending_requests)
        own = (
            (metrics.prefix_cache_hits, counters.cached_tokens),
            (metrics.prefix_cache_queries, counters.queried_tokens),
        )
        self.count(counters, own)

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
        super().transferred(size, seconds)
        self._metrics.request_success.inc(finished_reason="length")

    def expired(self) -> None:
        """A request ended before its transfer did: cancelled, or out of time."""
        self._metrics.nixl_num_kv_expired_reqs.inc()
