"""The engine thread of a decode worker: see `worker.engine_loop`."""

from __future__ import annotations

from collections.abc import Sequence

from decode_service.events import Event, Load
from decode_service.scheduler import Scheduler
from engine.batch import Batch
from worker import engine_loop


class EngineLoop(engine_loop.EngineLoop[Scheduler, Event, Load]):
    """Owns the scheduler and the runner from `start` to `stop`."""

    def cancel(self, key: str) -> None:
        """End a request before the next step. From any thread. What it cost is counted from here."""
        posted = self.steps
        self.post(lambda scheduler: scheduler.cancel(key, posted))

    def _schedule(self) -> tuple[Sequence[Event], Batch | None]:
        return (), self._scheduler.schedule()

    def _prompt_tokens(self, batch: Batch) -> int:
        return sum(part.num_known for part in batch.slices if part.num_known > 1)

    def _measure(self, batch: Batch, seconds: float) -> None:
        self._scheduler.timed(batch, seconds)
        super()._measure(batch, seconds)
