"""What every worker tells Prometheus, under the field's names (`tandem.service.metrics`)."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter

from engine.batch import Batch
from tandem.service.metrics import Metrics
from worker.events import Counters


class StepMetrics:
    """Turns a scheduler's counters into metrics. `step`, `checked` and `observe` are for the engine thread."""

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
        self._seen: dict[Counter, float] = {}

    def step(self, batch: Batch, seconds: float) -> None:
        """One step is over."""
        self._metrics.iteration_tokens_total.observe(batch.num_tokens)
        self._step_seconds.observe(seconds)

    def checked(self, right: bool) -> None:
        """The books were checked."""
        self._checks.inc()
        if not right:
            self._failed_checks.inc()

    def transferred(self, size: int, seconds: float) -> None:
        """A transfer was committed. On the event loop."""
        self._metrics.nixl_bytes_transferred.inc(size)
        self._metrics.nixl_xfer_time_seconds.observe(seconds)

    def transfer_failed(self) -> None:
        """A transfer ended without a commit. On the event loop."""
        self._metrics.nixl_num_failed_transfers.inc()

    def count(self, counters: Counters, more: Iterable[tuple[Counter, int]]) -> None:
        """Adds what was counted since the last call; `more` are the room's own counters and their values now."""
        metrics = self._metrics
        self._worst_late_steps.set(counters.worst_steps_after_cancel)
        common = (
            (metrics.prompt_tokens, counters.prompt_tokens),
            (metrics.prompt_tokens_cached, counters.cached_tokens),
            (metrics.generation_tokens, counters.generated_tokens),
            (self._cancelled, counters.cancelled),
            (self._late_steps, counters.steps_after_cancel),
        )
        self.add((*common, *more))

    def add(self, values: Iterable[tuple[Counter, float]]) -> None:
        """Brings each counter to its value now."""
        for target, value in values:
            if value > (before := self._seen.get(target, 0)):
                target.inc(value - before)
                self._seen[target] = value
