"""What Prometheus is told of the workers and of the queue before them. Made anew at each scrape from what is listed
then, so a worker that has left takes its series along.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.dispatch import Dispatcher
from gateway.pairing import rate_of
from gateway.pool import WorkerPool
from gateway.workers import Worker

ROLE = "gateway"
STATES = ("ready", "ejected", "draining", "lost")


def state_of(worker: Worker) -> str:
    """One of STATES."""
    if not worker.connected:
        return "lost"
    if worker.draining:
        return "draining"
    return "ready" if worker.breaker.closed else "ejected"


class PoolMetrics(Collector):
    """For the event loop, which answers scrapes."""

    def __init__(self, pool: WorkerPool, dispatcher: Dispatcher) -> None:
        """Looks at both when it is asked."""
        self._pool, self._dispatcher = pool, dispatcher

    def describe(self) -> list[Metric]:
        """Nothing is collected to register it."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All of it."""
        yield from self._queue()
        yield from self._counts()
        yield from self._each()

    def _queue(self) -> Iterator[Metric]:
        tokens = self._dispatcher.queued_tokens
        rates = [rate_of(worker) for worker in self._pool.prefill if worker.ready]
        one = sum(rates) / len(rates) if rates else 0.0
        queued = GaugeMetricFamily(
            "tandem_queued_prefill_tokens", "Prompt tokens accepted and not yet computed.", labels=["role"]
        )
        queued.add_metric([ROLE], tokens)
        yield queued
        seconds = GaugeMetricFamily(
            "tandem_queued_prefill_seconds", "Seconds of work for one prefill worker that wait.", labels=["role"]
        )
        seconds.add_metric([ROLE], tokens / one if one else 0.0)
        yield seconds

    def _counts(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily(
            "tandem_workers", "Workers that are listed, by state.", labels=["role", "worker_role", "state"]
        )
        ejections = CounterMetricFamily(
            "tandem_worker_ejections", "Workers ejected for failures in a row.", labels=["role", "worker_role"]
        )
        for role, pool in (("prefill", self._pool.prefill), ("decode", self._pool.decode)):
            states = [state_of(worker) for worker in pool]
            for state in STATES:
                workers.add_metric([ROLE, role, state], states.count(state))
            ejections.add_metric([ROLE, role], self._pool.ejections[role])
        lookups = CounterMetricFamily(
            "tandem_discovery_failures", "Lookups of workers that failed; the last answer stays.", labels=["role"]
        )
        lookups.add_metric([ROLE], self._pool.failed_lookups)
        yield from (workers, ejections, lookups)

    def _each(self) -> Iterator[Metric]:
        labels = ["role", "worker_role", "worker"]
        running = GaugeMetricFamily(
            "tandem_worker_running_sequences", "Sequences that this gateway runs on a worker.", labels=labels
        )
        failures = CounterMetricFamily(
            "tandem_worker_failures", "Requests that failed on a worker, by its fault.", labels=labels
        )
        for worker in (*self._pool.prefill, *self._pool.decode):
            values = [ROLE, worker.role, worker.address]
            running.add_metric(values, worker.outstanding)
            failures.add_metric(values, worker.failures)
        yield from (running, failures)
