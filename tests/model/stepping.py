"""Time stands still and nothing runs by itself: event loops and threads that go one step when they are told to.

A `SteppedLoop` is one process's event loop. What other threads hand to it (`call_soon_threadsafe`) waits in its inbox;
what it hands to an executor becomes a `Job`. Whoever explores decides which of them goes next, and `settle` runs the
loop's own callbacks, in the loop's order, until it has nothing to do. A job runs in a real thread, but only while
somebody waits for its `step`, and stops wherever the code under test calls something that calls `pause`.

Every event says what it read and wrote (`touch`), so that an explorer knows which events commute.
"""

from __future__ import annotations

import asyncio
import threading
from asyncio import events as asyncio_events
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

PART: ContextVar[Hashable] = ContextVar("PART", default=None)
"""Which part of its process's event loop a task or callback belongs to; those it starts belong to the same."""
SECONDS = 20.0
"""After which a step that does not come back is a bug of the test."""


@dataclass(slots=True)
class Accesses:
    """What one event did: resources by name, and which earlier events made what it consumed (their numbers)."""

    reads: set[Hashable] = field(default_factory=set)
    writes: set[Hashable] = field(default_factory=set)
    origins: set[int] = field(default_factory=set)

    def conflicts(self, other: Accesses) -> bool:
        """True when the two don't commute."""
        return not (
            self.writes.isdisjoint(other.writes)
            and self.writes.isdisjoint(other.reads)
            and self.reads.isdisjoint(other.writes)
        )


class Recorder:
    """Takes note of what the event that runs now reads and writes."""

    def __init__(self) -> None:
        self.number = -1
        self.accesses = Accesses()
        self.locks = 0

    def restart(self) -> None:
        """Another world begins."""
        self.number, self.locks = -1, 0

    def begin(self) -> Accesses:
        """The next event begins."""
        self.number += 1
        self.accesses = Accesses()
        return self.accesses

    def read(self, *resource: Hashable) -> None:
        """The event looked at `resource`."""
        self.accesses.reads.add(resource)

    def write(self, *resource: Hashable) -> None:
        """The event changed `resource`, or did what must keep its order with others' looks at it."""
        self.accesses.writes.add(resource)


class Abandoned(BaseException):
    """Unwinds a job that nobody will step any more."""


class Stepper(threading.Thread):
    """A thread that runs functions up to their next `pause`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._work: Callable[[], Any] | None = None
        self._abandoned = False
        self.over = True
        self.result: Any = None
        self.error: BaseException | None = None
        self.ready: Callable[[], bool] | None = None
        """What the function waits for, when it does."""
        self.start()

    def run(self) -> None:
        while True:
            self._go.acquire()
            work, self._work = self._work, None
            assert work is not None
            try:
                self.result = work()
            except BaseException as error:
                self.error = error
            self.over = True
            self._back.release()

    def begin(self, work: Callable[[], Any]) -> None:
        """`work` starts with the next `step`."""
        self._work, self._abandoned, self.over = work, False, False
        self.result = self.error = self.ready = None

    def step(self) -> None:
        """Run to the next pause, or to the end."""
        self._go.release()
        if not self._back.acquire(timeout=SECONDS):
            raise RuntimeError("a job does not come to its next pause")

    def abandon(self) -> None:
        """Unwind what is paused."""
        self._abandoned = True
        while not self.over:
            self.step()

    def pause(self, ready: Callable[[], bool] | None = None) -> None:
        """In the thread: stop here until the next step."""
        if self._abandoned:
            raise Abandoned
        self.ready = ready
        self._back.release()
        self._go.acquire()
        self.ready = None
        if self._abandoned:
            raise Abandoned


def pause(ready: Callable[[], bool] | None = None) -> None:
    """A place where a job's thread may lose the processor. Does nothing on the event loop's thread."""
    thread = threading.current_thread()
    if isinstance(thread, Stepper):
        thread.pause(ready)


def condition(recorder: Recorder) -> type:
    """In place of `threading.Condition`: a job that waits is one that can't go on before its condition holds."""

    class SteppedCondition:
        def __init__(self) -> None:
            self.number, recorder.locks = recorder.locks, recorder.locks + 1

        def __enter__(self) -> SteppedCondition:
            recorder.read("lock", self.number)
            return self

        def __exit__(self, *_: object) -> None:
            """One thread runs at a time, and none pauses while it holds this."""

        def notify_all(self) -> None:
            """Whoever waits is asked before each step."""

        def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
            """As the real one, without a timeout."""
            if not predicate():
                assert isinstance(threading.current_thread(), Stepper), "the event loop's thread would block"
                pause(predicate)
            return True

    return SteppedCondition


class Job:
    """One piece of work in a process's executor."""

    _idle: list[Stepper] = []  # noqa: RUF012  # shared: threads are dear

    def __init__(self, work: Callable[[], Any], future: asyncio.Future[Any], origin: int) -> None:
        self._work, self.future, self.origin = work, future, origin
        self.part = PART.get()
        self._stepper: Stepper | None = None

    @property
    def ready(self) -> bool:
        """False while it waits for a condition, and once it was cancelled before it began."""
        if self._stepper is None:
            return not self.future.cancelled()
        return self._stepper.ready is None or self._stepper.ready()

    def step(self) -> bool:
        """One step; True when it is over."""
        if self._stepper is None:
            self._stepper = self._idle.pop() if self._idle else Stepper()
            self._stepper.begin(self._work)
        self._stepper.step()
        return self._stepper.over

    def outcome(self) -> tuple[Any, BaseException | None]:
        """Result and error of one that is over; its thread is free for others."""
        stepper, self._stepper = self._stepper, None
        assert stepper is not None
        self._idle.append(stepper)
        return stepper.result, stepper.error

    def abandon(self) -> None:
        """Nobody will step it any more."""
        if self._stepper is not None:
            self._stepper.abandon()
            self.outcome()


class SteppedLoop(asyncio.BaseEventLoop):
    """One process's event loop, without clock and sockets."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        super().__init__()
        self.name = name
        self._selector = self  # `_run_once` asks it for events
        self._recorder = recorder
        self.inbox: dict[Hashable, deque[tuple[Callable[..., Any], tuple[Any, ...], int]]] = {}
        """By the thread that handed it in. A thread may be held up before it does so: no order between threads."""
        self.jobs: dict[int, Job] = {}
        self.muted = False
        self._thread: Hashable = "loop"
        self.instant = False
        """Jobs run at once, as one event with what asked for them."""
        self._next_job = 0
        self.errors: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        """Stands still: no timeout passes."""
        return 0.0

    def select(self, timeout: float | None) -> list[Any]:
        """No sockets."""
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """No sockets."""

    def call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        """Into the inbox; the explorer delivers it."""
        if not self.muted:
            self.inbox.setdefault(self._thread, deque()).append((callback, args, self._recorder.number))

    def take(self, thread: Hashable) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
        """The first of what a thread handed in."""
        waiting = self.inbox[thread]
        first = waiting.popleft()
        if not waiting:
            del self.inbox[thread]
        return first

    @contextmanager
    def thread(self, name: Hashable) -> Iterator[None]:
        """What is called inside runs in another thread of the process."""
        self._thread = name
        try:
            yield
        finally:
            self._thread = "loop"

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """A job, for the explorer to step. The executor itself is never used."""
        future: asyncio.Future[Any] = self.create_future()
        if self.instant:
            try:
                future.set_result(func(*args))
            except Exception as error:
                future.set_exception(error)
            return future
        self.jobs[self._next_job] = Job(lambda: func(*args), future, self._recorder.number)
        self._next_job += 1
        return future

    def step_job(self, number: int) -> None:
        """One step of a job; its outcome goes to the inbox, as from a real thread."""
        job = self.jobs[number]
        with self.thread(number):
            if not job.step():
                return
            del self.jobs[number]
            result, error = job.outcome()
            self.call_soon_threadsafe(_resolve, job.future, result, error)

    def settle(self, callback: Callable[..., Any] | None = None, *args: Any) -> None:
        """Call `callback` on the loop and run the loop until it has nothing to do; whose callbacks ran is recorded."""
        if callback is not None:
            self.call_soon(callback, *args)
        asyncio_events._set_running_loop(self)
        try:
            while self._ready:
                for handle in self._ready:
                    self._recorder.write(self.name, handle._context.get(PART))
                self._run_once()
        finally:
            asyncio_events._set_running_loop(None)

    def end(self) -> None:
        """The run is over, or the process was killed and nobody looks any more: unwind everything, tell nobody."""
        self.muted = True
        for job in self.jobs.values():
            job.abandon()
        self.jobs.clear()
        for task in asyncio.all_tasks(self):
            self.call_soon(task.cancel)
        self.settle()
        self.close()


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
