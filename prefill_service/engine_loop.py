"""The engine thread: receive commands, schedule, publish, run. The only code that touches the scheduler once it runs.

Life cycle: EngineLoop(...) -> `start()` inside the event loop -> `submit` and `release` from the event loop -> `stop()`
(joins the thread). Everything goes back in one `call_soon_threadsafe` per step: answers to commands, what the last step
brought, and who starts in the next one, just before that one runs.

A failing step fails those aboard, not the service, and whatever else goes wrong in a turn fails those who wait for a
step, not the thread. `alive` tells whether the engine turns, not only the socket.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.batch import Batch, StepRunner
from prefill_service.events import Admission, Event, Load
from prefill_service.metrics import StepMetrics
from prefill_service.scheduler import Scheduler
from tandem.errors import InternalError, TandemError, UnavailableError
from tandem.record import Record
from tandem.service.logging import get_logger
from tandem.service.pulse import IdleCheck, Pulse

_log = get_logger(__name__)
IDLE_BEAT = 0.5
"""Seconds after which an idle engine turns its loop all the same."""
_RATE_MEMORY = 0.8


@dataclass(frozen=True, slots=True)
class _Submit:
    key: str
    record: Record
    future: asyncio.Future[Admission]


@dataclass(frozen=True, slots=True)
class _Release:
    key: str
    posted_step: int


@dataclass(frozen=True, slots=True)
class _Answer:
    future: asyncio.Future[Admission]
    result: Admission | Exception


class EngineLoop:
    """Owns the scheduler and the runner from `start` to `stop`."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        *,
        on_events: Callable[[list[Event]], None],
        on_load: Callable[[Load], None],
        metrics: StepMetrics | None = None,
    ) -> None:
        """`on_events` and `on_load` are called on the event loop; `on_load` only when the load has changed."""
        self._scheduler = scheduler
        self._runner = runner
        self._on_events = on_events
        self._on_load = on_load
        self._metrics = metrics
        self._commands: queue.SimpleQueue[_Submit | _Release | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="prefill-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self._load = scheduler.load()
        self._pulse = Pulse()
        self._check = IdleCheck(scheduler.check_integrity, metrics.checked if metrics is not None else None)
        self.prefill_rate = 0.0
        """Recent prompt tokens computed a second; 0 until measured."""

    @property
    def steps(self) -> int:
        """Steps launched since the start."""
        return self._scheduler.steps

    @property
    def load(self) -> Load:
        """How busy the scheduler was after its last turn."""
        return self._load

    @property
    def alive(self) -> bool:
        """False when the thread is over or hangs (`tandem.service.pulse`)."""
        return self._thread.is_alive() and self._pulse.beating

    def start(self) -> None:
        """Start the thread. Call inside the event loop that will wait for answers."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the step that runs; commands that come later are refused. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._commands.put(None)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    def submit(self, key: str, record: Record) -> asyncio.Future[Admission]:
        """See `Scheduler.submit`, whose result or error the future gets. However it ends, `release` the key after.

        The command is in the queue when this returns: a coroutine could be overtaken by the `release` of its call.
        """
        if self._stopped:
            raise UnavailableError("the engine has stopped")
        future: asyncio.Future[Admission] = asyncio.get_running_loop().create_future()
        self._commands.put(_Submit(key, record, future))
        return future

    def release(self, key: str) -> None:
        """The request is over: nothing more is computed for it, its blocks are freed. From any thread, idempotent."""
        self._commands.put(_Release(key, self._scheduler.steps))

    # -- the engine thread

    def _main(self) -> None:
        events: list[Event] = []
        idle = False
        while True:
            commands, stop = self._receive(idle)
            try:
                answers = self._execute(commands)
                started, batch = ([], None) if stop else self._schedule()
                self._publish(answers, events + started)
                events = [] if batch is None else self._step(batch)
                idle = batch is None
                if commands or batch is not None:
                    self._check.changed()
                if idle:
                    self._check.idle()
            except Exception as exc:  # our own bug: nobody may hang on it, and the thread goes on
                _log.error("the engine loop failed", exc_info=exc)
                events, idle = self._scheduler.fail_all(InternalError(f"the engine loop failed: {exc}")), False
            if stop:
                return
            self._pulse.turn()

    def _receive(self, idle: bool) -> tuple[list[_Submit | _Release], bool]:
        """All commands that are there, waiting a moment for the first when idle; True: stop after them."""
        commands: list[_Submit | _Release] = []
        try:
            while True:
                command = self._commands.get(block=idle and not commands, timeout=IDLE_BEAT)
                if command is None:
                    return commands, True
                commands.append(command)
        except queue.Empty:
            return commands, False

    def _execute(self, commands: list[_Submit | _Release]) -> list[_Answer]:
        answers: list[_Answer] = []
        for command in commands:
            try:
                if isinstance(command, _Submit):
                    answers.append(_Answer(command.future, self._scheduler.submit(command.key, command.record)))
                else:
                    self._scheduler.release(command.key, command.posted_step)
            except Exception as exc:  # one caller's error, not the engine's
                if isinstance(command, _Submit):
                    answers.append(_Answer(command.future, exc))
                else:
                    _log.error("release failed", exc_info=exc)
        return answers

    def _schedule(self) -> tuple[list[Event], Batch | None]:
        try:
            return self._scheduler.schedule()
        except Exception as exc:
            _log.error("scheduling failed", exc_info=exc)
            return self._scheduler.fail_all(InternalError(f"scheduling failed: {exc}")), None

    def _step(self, batch: Batch) -> list[Event]:
        started = time.perf_counter()
        try:
            with self._pulse.step():
                output = self._runner.run(batch)
        except Exception as exc:  # those aboard fail, the service goes on
            _log.error("step failed", requests=[part.request_id for part in batch.slices], exc_info=exc)
            error = exc if isinstance(exc, TandemError) else InternalError(f"an engine step failed: {exc}")
            return self._scheduler.fail_step(error)
        events = self._scheduler.update(batch, output)
        self._measure(batch, time.perf_counter() - started)
        return events

    def _measure(self, batch: Batch, seconds: float) -> None:
        rate = batch.num_tokens / max(seconds, 1e-6)
        memory = _RATE_MEMORY if self.prefill_rate else 0.0
        self.prefill_rate = memory * self.prefill_rate + (1 - memory) * rate
        if self._metrics is not None:
            self._metrics.step(batch, seconds)

    def _publish(self, answers: list[_Answer], events: list[Event]) -> None:
        load = self._scheduler.load()
        changed, self._load = load != self._load, load
        if answers or events or changed:
            assert self._loop is not None
            try:
                self._loop.call_soon_threadsafe(self._deliver, answers, events, load if changed else None)
            except RuntimeError:
                _log.info("the event loop has closed before the engine")
        if self._metrics is not None:
            self._metrics.observe(load, self._scheduler.counters)

    # -- the event loop

    def _deliver(self, answers: list[_Answer], events: list[Event], load: Load | None) -> None:
        for answer in answers:
            if answer.future.done():
                continue
            if isinstance(answer.result, Exception):
                answer.future.set_exception(answer.result)
            else:
                answer.future.set_result(answer.result)
        if events:
            self._on_events(events)
        if load is not None:
            self._on_load(load)
