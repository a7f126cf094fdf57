"""The engine thread of a decode worker: see `worker.engine_loop`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from decode_service.events import Event, Load
from decode_service.scheduler import Scheduler
from engine.batch import Batch
from tandem.record import Record
from worker import engine_loop


class EngineLoop(engine_loop.EngineLoop[Scheduler, Event, Load]):
    """Owns the scheduler and the runner from `start` to `stop`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `worker.engine_loop.EngineLoop`."""
        super().__init__(*args, **kwargs)
        self._arrived: list[int] = []

    def cancel(self, key: str) -> None:
        """End a request before the next step. From any thread. What it cost is counted from here."""
        posted = self.steps
        self.post(lambda scheduler: scheduler.cancel(key, posted))

    def commit(self, key: str, record: Record, token_end: int, blocks: Sequence[int]) -> asyncio.Future[None]:
        """See `Scheduler.commit`. `blocks` are those that the transfer has filled: the next step brings them where it
        computes, before anything reads them."""

        def run(scheduler: Scheduler) -> tuple[None, Sequence[Event]]:
            events = scheduler.commit(key, record, token_end)
            self._arrived += blocks
            return None, events

        return self.call_with_events(run)

    def _schedule(self) -> tuple[Sequence[Event], Batch | None]:
        batch = self._scheduler.schedule()
        if batch is not None:
            batch.arrived.extend(self._arrived)
            self._arrived.clear()
        return (), batch

    def _schedule_ahead(self) -> Batch | None:
        return self._scheduler.schedule_ahead() if not self._arrived else None

    def _forget_ahead(self) -> None:
        self._scheduler.forget_ahead()

    def _prompt_tokens(self, batch: Batch) -> int:
        return sum(part.num_known for part in batch.slices if part.num_known > 1)

    def _measure(self, batch: Batch, seconds: float) -> None:
        self._scheduler.timed(batch, seconds)
        super()._measure(batch, seconds)
