"""What a decode worker tells Prometheus, under the field's names (`tandem.service.metrics`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import Counter

from decode_service.events import Load
from decode_service.scheduler import Scheduler
from decode_service.speculation.counts import Counts
from tandem.service.metrics import Metrics
from worker import metrics

TOLD_EVERY: Final = 64
"""Steps after which figures of drafts are told although none was verified."""


class DraftMetrics:
    """What speculation has done."""

    def __init__(self, metrics: Metrics) -> None:
        """`metrics` is the process's own."""
        self._metrics = metrics
        new = metrics.labelled_counter
        self._tried_at = new("spec_decode_num_draft_tokens_per_pos", "Draft tokens verified, by place.", "position")
        self._kept_at = new("spec_decode_num_accepted_tokens_per_pos", "Draft tokens kept, by place.", "position")
        self._tried_of = new("spec_decode_proposer_draft_tokens", "Draft tokens verified, by proposer.", "proposer")
        self._kept_of = new("spec_decode_proposer_accepted_tokens", "Draft tokens kept, by proposer.", "proposer")
        self._seconds_of = new("spec_decode_proposer_seconds", "Time in which drafts were made.", "proposer")
        self._lost_of = new(
            "spec_decode_rejected_seconds", "Time of steps lost to drafts that weren't kept, an estimate.", "proposer"
        )
        self._mean = metrics.gauge("spec_decode_mean_acceptance_length", "Tokens a draft brought, the sure one too.")

    def changes(self, counts: dict[str, Counts]) -> Iterator[tuple[Counter, float]]:
        """Each counter that may have changed, with its value now."""
        metrics, role = self._metrics, self._metrics.role
        drafts = sum(each.drafts for each in counts.values())
        accepted = sum(each.accepted_tokens for each in counts.values())
        yield metrics.spec_decode_num_drafts, drafts
        yield metrics.spec_decode_num_draft_tokens, sum(each.draft_tokens for each in counts.values())
        yield metrics.spec_decode_num_accepted_tokens, accepted
        self._mean.set(1 + accepted / drafts if drafts else 1)
        places = max((len(each.tried_at) for each in counts.values()), default=0)
        for place in range(places):
            having = [each for each in counts.values() if place < len(each.tried_at)]
            yield self._tried_at.labels(role, str(place)), sum(each.tried_at[place] for each in having)
            yield self._kept_at.labels(role, str(place)), sum(each.accepted_at[place] for each in having)
        for name, each in counts.items():
            yield self._tried_of.labels(role, name), each.draft_tokens
            yield self._kept_of.labels(role, name), each.accepted_tokens
            yield self._seconds_of.labels(role, name), each.seconds
            yield self._lost_of.labels(role, name), each.lost_seconds


class StepMetrics(metrics.StepMetrics):
    """Turns the scheduler's counters into metrics."""

    def __init__(self, metrics: Metrics) -> None:
        """`metrics` is the process's own."""
        super().__init__(metrics)
        self._drafts = DraftMetrics(metrics)
        self._drafted_before = self._told_at = 0

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
        counts = scheduler.speculator.counts
        drafted = sum(each.draft_tokens for each in counts.values())
        # The time of asking passes where nothing is verified too; to say so at each step would cost some itself.
        if drafted != self._drafted_before or scheduler.steps - self._told_at >= TOLD_EVERY:
            self._drafted_before, self._told_at = drafted, scheduler.steps
            self.add(self._drafts.changes(counts))
