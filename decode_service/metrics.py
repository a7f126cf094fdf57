"""What a decode worker tells Prometheus, under the field's names (`tandem.service.metrics`)."""

from __future__ import annotations

from collections.abc import Callable

from decode_service.events import Load
from decode_service.scheduler import Scheduler
from worker import metrics


class StepMetrics(metrics.StepMetrics):
    """Turns the scheduler's counters into metrics."""

    def watch_leases(self, held: Callable[[], int], orphaned: Callable[[], int]) -> None:
        """Both are asked at each scrape, on its thread."""
        self._metrics.gauge("leases", "Leases whose blocks are not freed yet.").set_function(held)
        self._metrics.gauge("leases_orphaned", "Of them, those whose request is over.").set_function(orphaned)

    def observe(self, load: Load, scheduler: Scheduler) -> None:
        """Sets the gauges and adds what was counted since the last call."""
        metrics, counters, stats = self._metrics, scheduler.counters, scheduler.pool.stats
        metrics.num_requests_running.set(load.running_sequences)
        metrics.num_requests_waiting.set(load.waiting_requests + load.receiving_requests)
        metrics.kv_cache_usage_perc.set(1 - load.free_blocks / load.total_blocks)
        size = scheduler.pool.block_size
        own = (
            (metrics.num_preemptions, counters.preemptions),
            (metrics.prefix_cache_queries, stats.queried_blocks * size),
            (metrics.prefix_cache_hits, stats.hit_blocks * size),
        )
        self.count(counters, own)
