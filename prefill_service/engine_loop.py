"""The engine thread of a prefill worker: see `worker.engine_loop`. `submit` and `release` come from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from engine.batch import Batch
from prefill_service.events import Admission, Event, Load
from prefill_service.scheduler import Scheduler
from tandem.record import Record
from worker import engine_loop


class EngineLoop(engine_loop.EngineLoop[Scheduler, Event, Load]):
    """Owns the scheduler and the runner from `start` to `stop`."""

    def submit(self, key: str, record: Record) -> asyncio.Future[Admission]:
        """See `Scheduler.submit`, whose result or error the future gets. However it ends, `release` the key after."""
        return self.call(lambda scheduler: scheduler.submit(key, record))

    def release(self, key: str) -> None:
        """The request is over: nothing more is computed for it, its blocks are freed. From any thread, idempotent."""
        posted = self.steps
        self.post(lambda scheduler: scheduler.release(key, posted))

    def _schedule(self) -> tuple[Sequence[Event], Batch | None]:
        return self._scheduler.schedule()

    def _prompt_tokens(self, batch: Batch) -> int:
        return batch.num_tokens
