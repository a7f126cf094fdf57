"""The engine thread by itself: answers, errors, the end; and the bounded buffer of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from decode_scheduling import Driver, make_record

from decode_service.engine_loop import EngineLoop
from decode_service.events import Ended, Event, Finished, Load, Tokens
from decode_service.streams import OutputStream, Pulse, Retargeted
from tandem.errors import InternalError, OverloadedError, TandemError
from tandem.record import FinishReason, TokenDelta
from worker.events import Failed


class Bench:
    """An engine loop over the scheduler tests' driver."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.events: list[Event] = []
        self.loads: list[Load] = []
        self.news = asyncio.Event()
        self.engine = EngineLoop(
            "engine", self.driver.scheduler, self.driver.runner, on_events=self.take, on_load=self.loads.append
        )

    def take(self, events: list[Event]) -> None:
        self.events += events
        self.news.set()

    async def until(self, kind: type) -> Event:
        async with asyncio.timeout(10):
            while True:
                for event in self.events:
                    if isinstance(event, kind):
                        return event
                self.news.clear()
                await self.news.wait()


@asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    bench = Bench()
    bench.engine.start()
    try:
        yield bench
    finally:
        await bench.engine.stop()


async def test_events_and_loads_reach_the_event_loop() -> None:
    async with running() as bench:
        await bench.engine.call(lambda scheduler: scheduler.admit("a", make_record(6, max_tokens=4), local=True))
        await bench.until(Ended)
        assert sum(len(d.token_ids) for e in bench.events if isinstance(e, Tokens) for d in e.deltas) == 4
        assert bench.loads[-1].running_sequences == 0
        assert bench.engine.steps == 4
        assert bench.engine.prefill_rate > 0


@pytest.mark.parametrize("broken", ["schedule", "update"])
async def test_a_bug_of_the_scheduler_fails_everybody_and_the_thread_lives(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as bench:
        scheduler = bench.driver.scheduler

        def bug(*_: object) -> None:
            monkeypatch.undo()
            raise ZeroDivisionError("bug")

        monkeypatch.setattr(scheduler, broken, bug)
        await bench.engine.call(lambda scheduler: scheduler.admit("a", make_record(6), local=True))
        failed = await bench.until(Failed)
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, InternalError)
        assert await bench.engine.call(len) == 0
        await bench.engine.call(lambda scheduler: scheduler.admit("b", make_record(6), local=True))
        await bench.until(Ended)


async def test_a_bug_between_two_steps_fails_everybody_and_the_thread_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as bench:

        def bug(*_: object) -> None:
            monkeypatch.undo()
            raise ZeroDivisionError("bug")

        monkeypatch.setattr(bench.engine, "_measure", bug)
        await bench.engine.call(lambda scheduler: scheduler.admit("a", make_record(6), local=True))
        await bench.until(Failed)
        assert bench.engine.alive
        assert await bench.engine.call(len) == 0


async def test_commands_before_the_stop_are_answered() -> None:
    bench = Bench()
    call = bench.engine.call(len)
    bench.engine.post(lambda scheduler: scheduler.admit("a", make_record(6), local=True))
    bench.engine.cancel("a")
    bench.engine._commands.put(None)
    bench.engine.start()
    assert await call == 0
    await bench.engine.stop()
    bench.driver.assert_empty()
    assert bench.engine.steps == 0


def tokens(*ids: int, index: int = 0, position: int = 0) -> Tokens:
    return Tokens("a", [TokenDelta(index, position, list(ids))])


async def test_a_stream_joins_what_waits() -> None:
    stream = OutputStream(limit=10)
    stream.put(tokens(1, 2))
    stream.put(tokens(3, position=2))
    stream.put(tokens(4, index=1))
    stream.put(Finished("a", 0, FinishReason.LENGTH, 3))
    stream.pulse(7)
    stream.pulse(8)
    stream.answer(Retargeted(1, committed=True))
    items = await stream.get()
    assert [item.token_ids for item in items if isinstance(item, TokenDelta)] == [[1, 2, 3], [4]]
    assert [item.steps for item in items if isinstance(item, Pulse)] == [8]
    assert not stream.ended
    stream.put(Ended("a", 0))
    assert stream.ended
    stream.pulse(9)
    assert await stream.get() == [Ended("a", 0)]


async def test_a_full_stream_fails_and_stays_failed() -> None:
    stream = OutputStream(limit=3)
    stream.put(tokens(1, 2, 3))
    assert not stream.failed.done()
    stream.put(tokens(4, position=3))
    stream.put(tokens(5, position=4))
    stream.pulse(1)
    stream.answer(Retargeted(1, committed=True))
    stream.fail(TandemError("another"))
    with pytest.raises(OverloadedError) as caught:
        await stream.get()
    assert caught.value.reason == "SLOW_READER"


async def test_answers_nobody_takes_are_bounded_too() -> None:
    stream = OutputStream(limit=3)
    for attempt in range(4):
        stream.answer(Retargeted(attempt, committed=True))
    with pytest.raises(OverloadedError):
        await stream.get()


async def test_taking_makes_room() -> None:
    stream = OutputStream(limit=3)
    for position in range(0, 30, 3):
        stream.put(tokens(1, 2, 3, position=position))
        assert len(await stream.get()) == 1


async def test_a_failed_request_fails_its_stream() -> None:
    stream = OutputStream()
    stream.put(Failed("a", InternalError("bug")))
    assert stream.ended
    with pytest.raises(InternalError):
        await stream.get()
