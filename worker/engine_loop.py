"""The engine thread: receive commands, schedule, publish, run. The only code that touches the scheduler once it runs.

Life cycle: EngineLoop(...) -> `start()` inside the event loop -> commands from the event loop by `call` and `post` ->
`stop()` (joins the thread). Everything goes back in one `call_soon_threadsafe` per step: answers to commands, what the
last step and the commands brought, and what the schedule of the next step says, just before that one runs.

A failing step fails those aboard, not the service. Whatever else goes wrong in a turn fails those who wait for a step,
not the thread, and what was to be published still is. `alive` tells whether the engine turns, not only the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from engine.batch import Batch, Launched, OverlappingRunner, StepOutput, StepRunner
from tandem.errors import InternalError, TandemError, UnavailableError
from tandem.service.logging import get_logger
from tandem.service.pulse import IdleCheck, Pulse
from worker.events import Failed

_log = get_logger(__name__)
IDLE_BEAT = 0.5
"""Seconds after which an idle engine turns its loop all the same."""
JOIN_BEAT = 0.1
"""Seconds between two looks at a thread that is to end."""
_RATE_MEMORY = 0.8


class Scheduler(Protocol):
    """What the loop wants of a scheduler, beside its commands and `schedule`."""

    steps: int

    def update(self, batch: Batch, output: StepOutput) -> Sequence[Any]:
        """Take in what a step brought; its events."""
        ...

    def fail_step(self, error: TandemError) -> Sequence[Any]:
        """The step that was scheduled last failed: those aboard fail."""
        ...

    def fail_all(self, error: TandemError) -> Sequence[Any]:
        """The books are in doubt: everybody who waits for a step fails."""
        ...

    def load(self) -> Any:
        """How busy it is now; equal when nothing has changed."""
        ...

    def check_integrity(self) -> None:
        """Raises when the books are wrong."""
        ...


S = TypeVar("S", bound=Scheduler)
E = TypeVar("E")
L = TypeVar("L")
T = TypeVar("T")


class StepMetrics(Protocol[S, L]):  # type: ignore[misc]  # S and L are only taken in
    """Who is told of steps, on the engine thread."""

    def step(self, batch: Batch, seconds: float) -> None:
        """One step is over."""
        ...

    def observe(self, load: L, scheduler: S) -> None:
        """After each turn."""
        ...

    def checked(self, right: bool) -> None:
        """The books were checked."""
        ...


@dataclass(slots=True)
class Command:
    """Something to do between two steps, for an answer and events.

    `future` belongs to the event loop; None: nobody waits.
    """

    run: Callable[[Any], tuple[Any, Sequence[Any]]]
    future: asyncio.Future[Any] | None = None


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was launched and not taken in."""

    batch: Batch
    launched: Launched


@dataclass(frozen=True, slots=True)
class _Landed:
    """A step of a runner that can't launch: it was over at once."""

    output: StepOutput

    def collect(self) -> StepOutput:
        return self.output


@dataclass(slots=True)
class Answer:
    """How a command ended."""

    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None


class EngineLoop(ABC, Generic[S, E, L]):
    """Owns the scheduler and the runner from `start` to `stop`. S, E, L: the scheduler's type, its events, its load."""

    def __init__(
        self,
        name: str,
        scheduler: S,
        runner: StepRunner,
        *,
        on_events: Callable[[list[E | Failed]], None],
        on_load: Callable[[L], None],
        metrics: StepMetrics[S, L] | None = None,
    ) -> None:
        """`on_events` and `on_load` are called on the event loop; `on_load` only when the load has changed."""
        self._scheduler = scheduler
        self._runner = runner
        self._on_events = on_events
        self._on_load = on_load
        self._metrics = metrics
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._answers: list[Answer] = []
        self._events: list[E | Failed] = []
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self._load: L = scheduler.load()
        self._pulse = Pulse()
        self._launcher = runner if isinstance(runner, OverlappingRunner) else None
        self._flight: _Flight | None = None
        self._since = 0.0
        """When the step that is taken in next had the device for itself."""
        self._check = IdleCheck(scheduler.check_integrity, metrics.checked if metrics is not None else None)
        self.prefill_rate = 0.0
        """Prompt tokens a second in recent steps that computed some; 0 until measured."""

    @abstractmethod
    def _schedule(self) -> tuple[Sequence[E], Batch | None]:
        """What to publish before the next step, and the step. None: there is nothing to compute."""

    def _schedule_ahead(self) -> Batch | None:
        """The step behind the one that runs, if it can be said already. None: when that one is over."""
        return None

    def _forget_ahead(self) -> None:
        """What `_schedule_ahead` gave was not launched."""

    @abstractmethod
    def _prompt_tokens(self, batch: Batch) -> int:
        """Tokens of a step that count for `prefill_rate`."""

    @property
    def steps(self) -> int:
        """Steps launched since the start."""
        return self._scheduler.steps

    @property
    def load(self) -> L:
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
        """End the thread after the step that runs and the commands that wait; later ones are refused. Idempotent.

        A thread that hangs is left behind: it must not keep the process.
        """
        if not self._stopped:
            self._stopped = True
            self._commands.put(None)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._join)

    def call(self, run: Callable[[S], T]) -> asyncio.Future[T]:
        """Run `run` on the engine thread between two steps; the future gets its result or its error.

        The command is in the queue when this returns: a coroutine could be overtaken by the end of its call.
        """
        return self.call_with_events(lambda scheduler: (run(scheduler), ()))

    def call_with_events(self, run: Callable[[S], tuple[T, Sequence[E]]]) -> asyncio.Future[T]:
        """The same for a command that also brings events; they are published with its answer, in order."""
        if self._stopped:
            raise UnavailableError("the engine has stopped")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._commands.put(Command(run, future))
        return future

    def post(self, run: Callable[[S], object]) -> None:
        """The same without waiting. From any thread."""
        self._commands.put(Command(lambda scheduler: (run(scheduler), ())))

    # -- the engine thread

    def _join(self) -> None:
        while self.alive:
            self._thread.join(JOIN_BEAT)
        if self._thread.is_alive():
            _log.error("the engine hangs and is left behind")

    def _main(self) -> None:
        idle = stopping = False
        while not stopping:
            commands, stopping = self._receive(idle)
            try:
                idle = self._turn(commands, stopping, rested=idle and not commands)
            except Exception as exc:  # our own bug: nobody may hang on it, and the thread goes on
                _log.error("the engine loop failed", exc_info=exc)
                self._wait_for_the_other()
                self._events += self._scheduler.fail_all(InternalError(f"the engine loop failed: {exc}"))
                self._post(None)
                idle = True
            self._pulse.turn()

    def _turn(self, commands: list[Command], stopping: bool, *, rested: bool) -> bool:
        """From commands to what the step brought; `rested`: there was nothing for a beat. True: nothing to compute."""
        self._execute(commands)
        flight = self._flight
        batch = None if stopping or flight is not None else self._next_batch()
        self._publish()
        if batch is not None:
            self._since = time.perf_counter()
            flight = self._launch(batch)
        if flight is not None:
            self._land(flight, stopping)
        idle = batch is None and flight is None
        if commands or not idle:
            self._check.changed()
        elif rested:  # not sooner: the check would hold up what the last turn tells
            self._check.idle()
        return idle

    def _receive(self, idle: bool) -> tuple[list[Command], bool]:
        """All commands that are there, and whether to stop after them. Waits a moment for the first when idle."""
        commands: list[Command] = []
        try:
            while (command := self._commands.get(block=idle and not commands, timeout=IDLE_BEAT)) is not None:
                commands.append(command)
        except queue.Empty:
            return commands, False
        return commands, True

    def _execute(self, commands: list[Command]) -> None:
        for command in commands:
            result, error = None, None
            try:
                result, events = command.run(self._scheduler)
                self._events += events
            except Exception as exc:  # one caller's error, not the engine's
                error = exc
                if command.future is None:
                    _log.error("command failed", exc_info=exc)
            if command.future is not None:
                self._answers.append(Answer(command.future, result, error))

    def _next_batch(self) -> Batch | None:
        try:
            events, batch = self._schedule()
        except Exception as exc:  # our own bug: nobody may hang on it
            _log.error("scheduling failed", exc_info=exc)
            self._events += self._scheduler.fail_all(InternalError(f"scheduling failed: {exc}"))
            return None
        self._events += events
        return batch

    def _launch(self, batch: Batch) -> _Flight | None:
        """Start a step; one that fails at once is taken in here."""
        try:
            with self._pulse.step():
                if self._launcher is not None:
                    return _Flight(batch, self._launcher.launch(batch))
                return _Flight(batch, _Landed(self._runner.run(batch)))
        except Exception as exc:
            self._fail_step(batch, exc)
            return None

    def _launch_ahead(self) -> _Flight | None:
        """The next step, while one runs. One that can't be launched is scheduled again when that is over."""
        if self._launcher is None or not self._launcher.overlaps:
            return None
        try:
            batch = self._schedule_ahead()
            return _Flight(batch, self._launcher.launch(batch)) if batch is not None else None
        except Exception as exc:
            _log.error("a step ahead could not be launched", exc_info=exc)
            self._forget_ahead()
            return None

    def _land(self, flight: _Flight, stopping: bool) -> None:
        """Wait for a step and take it in; the next one is launched before where that can be said already."""
        self._flight = None if stopping else self._launch_ahead()
        try:
            with self._pulse.step():
                output = flight.launched.collect()
        except Exception as exc:  # those aboard fail, the service goes on
            self._wait_for_the_other()
            self._fail_step(flight.batch, exc)
            return
        try:
            self._events += self._scheduler.update(flight.batch, output)
        except Exception as exc:
            _log.error("update failed", exc_info=exc)
            self._wait_for_the_other()
            self._fail_update(flight.batch, InternalError(f"the scheduler failed: {exc}"))
            return
        now = time.perf_counter()
        self._measure(flight.batch, now - self._since)
        self._since = now

    def _wait_for_the_other(self) -> None:
        """A step behind one that failed brings nothing, but names blocks until it is over."""
        flight, self._flight = self._flight, None
        if flight is not None:
            with contextlib.suppress(Exception):
                flight.launched.collect()

    def _fail_step(self, batch: Batch, exc: Exception) -> None:
        _log.error("step failed", requests=[part.request_id for part in batch.slices], exc_info=exc)
        error = exc if isinstance(exc, TandemError) else InternalError(f"an engine step failed: {exc}")
        self._events += self._scheduler.fail_step(error)

    def _fail_update(self, batch: Batch, error: TandemError) -> None:
        """Those aboard whom the scheduler doesn't count as waiting any more have lost their news: they fail too."""
        failed = self._scheduler.fail_all(error)
        told = {event.key for event in failed}
        aboard = dict.fromkeys(part.request_id for part in batch.slices)
        self._events += failed
        self._events += [Failed(key, error) for key in aboard if key not in told]

    def _measure(self, batch: Batch, seconds: float) -> None:
        if tokens := self._prompt_tokens(batch):
            rate = tokens / max(seconds, 1e-6)
            memory = _RATE_MEMORY if self.prefill_rate else 0.0
            self.prefill_rate = memory * self.prefill_rate + (1 - memory) * rate
        if self._metrics is not None:
            self._metrics.step(batch, seconds)

    def _publish(self) -> None:
        load: L = self._scheduler.load()
        changed, self._load = load != self._load, load
        if self._answers or self._events or changed:
            self._post(load if changed else None)
        if self._metrics is not None:
            self._metrics.observe(load, self._scheduler)

    def _post(self, load: L | None) -> None:
        """Everything that waits to be told goes to the event loop."""
        answers, self._answers = self._answers, []
        events, self._events = self._events, []
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, answers, events, load)
        except RuntimeError:
            _log.info("the event loop has closed before the engine")

    # -- the event loop

    def _deliver(self, answers: list[Answer], events: list[E | Failed], load: L | None) -> None:
        for answer in answers:
            if answer.future.done():
                continue
            if answer.error is not None:
                answer.future.set_exception(answer.error)
            else:
                answer.future.set_result(answer.result)
        if events:
            self._on_events(events)
        if load is not None:
            self._on_load(load)
