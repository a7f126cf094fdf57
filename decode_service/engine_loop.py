"""The engine thread: receive commands, schedule, run, publish. The only code that touches the scheduler once it runs.

Life cycle: EngineLoop(...) -> `start()` inside the event loop -> commands from the event loop by `call`, `post` and
`cancel`
-> `stop()` (joins the thread). Answers and events go back in one `call_soon_threadsafe` per step for all streams,
answers to commands at once, before the step runs.

A failing step fails those aboard, not the service. `alive` tells whether the engine turns, not only the socket.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from decode_service.events import Event, Load
from decode_service.metrics import StepMetrics
from decode_service.scheduler import Scheduler
from engine.batch import Batch, StepRunner
from tandem.errors import InternalError, TandemError, UnavailableError
from tandem.service.logging import get_logger
from tandem.service.pulse import IdleCheck, Pulse

_log = get_logger(__name__)
_T = TypeVar("_T")
IDLE_BEAT = 0.5
"""Seconds after which an idle engine turns its loop all the same."""


@dataclass(slots=True)
class Command:
    """Something to do between two steps; `future` belongs to the event loop, None: nobody waits."""

    run: Callable[[Scheduler], Any]
    future: asyncio.Future[Any] | None = None


@dataclass(slots=True)
class Answer:
    """How a command ended."""

    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class EngineLoop:
    """Owns the scheduler and the runner from `start` to `stop`."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        *,
        on_events: Callable[[list[Event]], None],
        on_load: Callable[[Load], None] | None = None,
        metrics: StepMetrics | None = None,
    ) -> None:
        """`on_events` and `on_load` are called on the event loop."""
        self._scheduler = scheduler
        self._runner = runner
        self._on_events = on_events
        self._on_load = on_load
        self._metrics = metrics
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="decode-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self._load = scheduler.load()
        self._pulse = Pulse()
        self._check = IdleCheck(scheduler.check_integrity, metrics.checked if metrics is not None else None)
        self.prefill_rate = 0.0
        """Prompt tokens a second in recent steps that computed some; 0 until measured."""

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
        """End the thread after the step that runs and the commands that wait; later ones are refused."""
        if not self._stopped:
            self._stopped = True
            self._commands.put(None)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    def call(self, run: Callable[[Scheduler], _T]) -> asyncio.Future[_T]:
        """Run `run` on the engine thread between two steps; the future gets its result or its error.

        The command is in the queue when this returns: a coroutine could be overtaken by the end of its call.
        """
        if self._stopped:
            raise UnavailableError("the engine has stopped")
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._commands.put(Command(run, future))
        return future

    def post(self, run: Callable[[Scheduler], Any]) -> None:
        """The same without waiting. From any thread."""
        self._commands.put(Command(run))

    def cancel(self, key: str) -> None:
        """End a request before the next step. From any thread. What it cost is counted from here."""
        posted = self._scheduler.steps
        self.post(lambda scheduler: scheduler.cancel(key, posted))

    # -- the engine thread

    def _main(self) -> None:
        idle = stopping = False
        while not stopping:
            commands, stopping = self._receive(idle)
            try:
                idle = self._turn(commands, stopping)
            except Exception as exc:  # our own bug: nobody may hang on it, and the thread goes on
                _log.error("the engine loop failed", exc_info=exc)
                self._post([], self._scheduler.fail_all(InternalError(f"the engine loop failed: {exc}")), None)
                idle = True
            self._pulse.turn()

    def _turn(self, commands: list[Command], stopping: bool) -> bool:
        """From commands to what the step brought. True: there was nothing to compute."""
        answers, events = self._execute(commands)
        batch, failed = self._schedule() if not stopping else (None, [])
        self._publish(answers, events + failed)
        if batch is not None:
            self._publish([], self._step(batch))
        if commands or batch is not None:
            self._check.changed()
        if batch is None:
            self._check.idle()
        return batch is None

    def _receive(self, idle: bool) -> tuple[list[Command], bool]:
        """All commands that are there, and whether to stop after them. Waits a moment for the first when idle."""
        commands: list[Command] = []
        try:
            while (command := self._commands.get(block=idle and not commands, timeout=IDLE_BEAT)) is not None:
                commands.append(command)
        except queue.Empty:
            return commands, False
        return commands, True

    def _execute(self, commands: list[Command]) -> tuple[list[Answer], list[Event]]:
        answers: list[Answer] = []
        events: list[Event] = []
        for command in commands:
            answer = Answer(command.future) if command.future is not None else None
            try:
                result = command.run(self._scheduler)
            except Exception as exc:  # one caller's error, not the engine's
                if answer is None:
                    _log.error("command failed", exc_info=exc)
                else:
                    answer.error = exc
            else:
                if answer is not None:
                    answer.result = result
                events += result if isinstance(result, list) else []
            if answer is not None:
                answers.append(answer)
        return answers, events

    def _schedule(self) -> tuple[Batch | None, list[Event]]:
        try:
            return self._scheduler.schedule(), []
        except Exception as exc:  # our own bug: nobody may hang on it
            _log.error("scheduling failed", exc_info=exc)
            return None, self._scheduler.fail_all(InternalError(f"scheduling failed: {exc}"))

    def _step(self, batch: Batch) -> list[Event]:
        started = time.perf_counter()
        try:
            with self._pulse.step():
                output = self._runner.run(batch)
        except Exception as exc:  # those aboard fail, the service goes on
            _log.error("step failed", requests=[part.request_id for part in batch.slices], exc_info=exc)
            error = exc if isinstance(exc, TandemError) else InternalError(f"an engine step failed: {exc}")
            return self._scheduler.fail_step(error)
        try:
            events = self._scheduler.update(batch, output)
        except Exception as exc:
            _log.error("update failed", exc_info=exc)
            return self._scheduler.fail_all(InternalError(f"the scheduler failed: {exc}"))
        self._measure(batch, time.perf_counter() - started)
        return events

    def _measure(self, batch: Batch, seconds: float) -> None:
        prompt_tokens = sum(len(part.token_ids) for part in batch.slices if len(part.token_ids) > 1)
        if prompt_tokens:
            rate = prompt_tokens / max(seconds, 1e-6)
            self.prefill_rate = rate if not self.prefill_rate else 0.8 * self.prefill_rate + 0.2 * rate
        if self._metrics is not None:
            self._metrics.step(batch, seconds)

    def _publish(self, answers: list[Answer], events: list[Event]) -> None:
        load = self._scheduler.load()
        changed, self._load = load != self._load, load
        if answers or events or changed:
            self._post(answers, events, load if changed else None)
        if self._metrics is not None:
            self._metrics.observe(load, self._scheduler)

    def _post(self, answers: list[Answer], events: list[Event], load: Load | None) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, answers, events, load)
        except RuntimeError:
            _log.info("the event loop has closed before the engine")

    # -- the event loop

    def _deliver(self, answers: list[Answer], events: list[Event], load: Load | None) -> None:
        for answer in answers:
            if answer.future.done():
                continue
            if answer.error is not None:
                answer.future.set_exception(answer.error)
            else:
                answer.future.set_result(answer.result)
        if events:
            self._on_events(events)
        if load is not None and self._on_load is not None:
            self._on_load(load)
