"""A scheduler and a runner of a few lines, for tests of what both worker services share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from engine.batch import Batch, Slice, StepOutput
from tandem.errors import TandemError
from worker import engine_loop
from worker.events import Failed


@dataclass(frozen=True)
class News:
    """A request has `left` steps to go."""

    key: str
    left: int


class TinyScheduler:
    """Requests are numbers of steps; all of them are in every step."""

    def __init__(self) -> None:
        self.steps = 0
        self.requests: dict[str, int] = {}
        self.broken: dict[str, Exception] = {}

    def break_next(self, method: str) -> None:
        """`schedule`, `update` or `load` raises once."""
        self.broken[method] = ZeroDivisionError("bug")

    def break_on(self, key: str) -> None:
        """The update raises once it has taken in this request's last step."""
        self.broken[key] = ZeroDivisionError("bug")

    def _check(self, method: str) -> None:
        if (error := self.broken.pop(method, None)) is not None:
            raise error

    def submit(self, key: str, steps: int) -> tuple[int, list[News]]:
        self.requests[key] = steps
        return steps, [News(key, steps)]

    def schedule(self) -> Batch | None:
        self._check("schedule")
        if not self.requests:
            return None
        self.steps += 1
        return Batch([Slice(key, [1], 0, [0]) for key in self.requests])

    def update(self, batch: Batch, output: StepOutput) -> list[News]:
        self._check("update")
        events = []
        for part in batch.slices:
            left = self.requests[part.request_id] = self.requests[part.request_id] - 1
            events.append(News(part.request_id, left))
            if not left:
                del self.requests[part.request_id]
                self._check(part.request_id)
        return events

    def fail_step(self, error: TandemError) -> list[Failed]:
        return self.fail_all(error)

    def fail_all(self, error: TandemError) -> list[Failed]:
        failed = [Failed(key, error) for key in self.requests]
        self.requests.clear()
        return failed

    def load(self) -> int:
        self._check("load")
        return len(self.requests)

    def check_integrity(self) -> None:
        pass


class TinyRunner:
    """A runner whose steps a test can hold up or make fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.error: Exception | None = None

    def warm_up(self) -> None:
        pass

    def hold(self) -> None:
        self.waiting.clear()
        self.gate.clear()

    def run(self, batch: Batch) -> StepOutput:
        if not self.gate.is_set():
            self.waiting.set()
            self.gate.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return StepOutput([[] for _ in batch.slices])


class TinyLoop(engine_loop.EngineLoop[TinyScheduler, News, int]):
    """The loop under test."""

    def submit(self, key: str, steps: int = 1) -> asyncio.Future[int]:
        return self.call_with_events(lambda scheduler: scheduler.submit(key, steps))

    def _schedule(self) -> tuple[Sequence[News], Batch | None]:
        return (), self._scheduler.schedule()

    def _prompt_tokens(self, batch: Batch) -> int:
        return batch.num_tokens


class Bench:
    """A loop whose publications are kept."""

    def __init__(self) -> None:
        self.scheduler, self.runner = TinyScheduler(), TinyRunner()
        self.events: list[Any] = []
        self.loads: list[int] = []
        self.engine = TinyLoop(
            "engine", self.scheduler, self.runner, on_events=self.events.extend, on_load=self.loads.append
        )

    def of(self, key: str) -> list[Any]:
        return [event for event in self.events if event.key == key]

    def failures(self, key: str) -> int:
        return sum(isinstance(event, Failed) for event in self.of(key))

    async def until_waiting(self) -> None:
        """A step is held up."""
        await until(self.runner.waiting.is_set)


@asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    bench = Bench()
    bench.engine.start()
    try:
        yield bench
    finally:
        bench.runner.gate.set()
        await bench.engine.stop()


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits for a condition that other threads bring about."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
