"""The engine thread over a tiny scheduler: answers, events, faults, the end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tiny_engine import Bench, News, TinyScheduler, running, until

from tandem.errors import InternalError, OverloadedError, UnavailableError
from tandem.service import pulse
from worker import engine_loop


async def test_answers_events_and_loads_reach_the_event_loop() -> None:
    async with running() as bench:
        assert await bench.engine.submit("a", 3) == 3
        await until(lambda: len(bench.events) == 4)
        assert bench.events == [News("a", left) for left in (3, 2, 1, 0)]
        await until(lambda: bench.loads == [1, 0])
        assert bench.engine.steps == 3
        assert bench.engine.prefill_rate > 0


async def test_one_call_to_the_event_loop_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as bench:
        calls = 0
        deliver = bench.engine._deliver

        def counting(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            deliver(*arguments)

        bench.runner.hold()
        await bench.engine.submit("first", 3)
        await bench.until_waiting()
        monkeypatch.setattr(bench.engine, "_deliver", counting)
        others = [bench.engine.submit(f"k{i}", 4) for i in range(3)]
        bench.runner.gate.set()
        await asyncio.gather(*others)
        await until(lambda: News("k2", 0) in bench.events)
        assert bench.engine.steps == 5
        assert calls == 5, "answers, events and loads of a turn go together"


async def test_a_command_s_events_come_before_those_of_the_next_step() -> None:
    async with running() as bench:
        await bench.engine.submit("a", 1)
        await until(lambda: len(bench.events) == 2)
        assert bench.events == [News("a", 1), News("a", 0)]


async def test_a_command_s_error_is_its_caller_s() -> None:
    async with running() as bench:

        def fail(_scheduler: TinyScheduler) -> None:
            raise OverloadedError("no")

        with pytest.raises(OverloadedError):
            await bench.engine.call(fail)
        bench.engine.post(fail)
        assert await bench.engine.call(lambda scheduler: len(scheduler.requests)) == 0


async def test_a_failing_step_fails_those_aboard_only() -> None:
    async with running() as bench:
        bench.runner.hold()
        await bench.engine.submit("poison", 2)
        await bench.until_waiting()
        other = bench.engine.submit("other", 2)
        bench.runner.error = RuntimeError("the device is on fire")
        bench.runner.gate.set()
        await other
        await until(lambda: News("other", 0) in bench.events)
        assert "on fire" in bench.of("poison")[-1].error.message


@pytest.mark.parametrize("method", ["schedule", "update", "load"])
async def test_a_bug_fails_requests_not_the_thread(method: str) -> None:
    async with running() as bench:
        bench.runner.hold()
        await bench.engine.submit("a", 3)
        await bench.until_waiting()
        bench.scheduler.break_next(method)
        bench.runner.gate.set()
        await until(lambda: bench.failures("a"))
        assert "bug" in bench.of("a")[-1].error.message
        await bench.engine.submit("b")
        await until(lambda: News("b", 0) in bench.events)


@pytest.mark.parametrize("method", ["schedule", "load"])
async def test_a_bug_in_a_turn_keeps_no_answer_back(method: str) -> None:
    async with running() as bench:
        bench.scheduler.break_next(method)
        assert await asyncio.wait_for(bench.engine.submit("a"), 5) == 1
        await until(lambda: bench.failures("a"))


async def test_a_bug_in_a_turn_keeps_no_news_of_the_last_step_back() -> None:
    async with running() as bench:
        bench.runner.hold()
        await bench.engine.submit("a", 1)
        await bench.until_waiting()
        bench.scheduler.break_next("load")
        bench.runner.gate.set()
        await until(lambda: News("a", 0) in bench.events)


async def test_who_was_done_before_an_update_failed_does_not_wait_for_ever() -> None:
    async with running() as bench:
        bench.runner.hold()
        await bench.engine.submit("first")
        await bench.until_waiting()
        both = bench.engine.submit("done", 1), bench.engine.submit("other", 2)
        bench.scheduler.break_on("done")
        bench.runner.gate.set()
        await asyncio.gather(*both)
        for key in ("done", "other"):
            await until(lambda key=key: bench.failures(key))
            assert bench.failures(key) == 1
        assert bench.failures("first") == 0


async def test_after_stop_commands_are_refused() -> None:
    async with running() as bench:
        await bench.engine.stop()
        assert not bench.engine.alive
        with pytest.raises(UnavailableError):
            await bench.engine.submit("a")
        bench.engine.post(len)  # type: ignore[arg-type]  # never run
        await bench.engine.stop()


async def test_stop_without_start() -> None:
    bench = Bench()
    await bench.engine.stop()
    assert not bench.engine.alive


async def test_commands_and_steps_before_the_stop_are_told() -> None:
    async with running() as bench:
        bench.runner.hold()
        await bench.engine.submit("a")
        await bench.until_waiting()
        waiting = bench.engine.submit("b")
        stopping = asyncio.ensure_future(bench.engine.stop())
        await until(lambda: bench.engine._commands.qsize() == 2)
        bench.runner.gate.set()
        await asyncio.gather(waiting, stopping)
        assert News("a", 0) in bench.events


async def test_stop_leaves_a_hanging_step_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "STEP_SECONDS", 0.3)
    async with running() as bench:
        bench.runner.hold()
        await bench.engine.submit("a")
        await bench.until_waiting()
        await asyncio.wait_for(bench.engine.stop(), 5)
        assert not bench.engine.alive


async def test_books_are_checked_a_beat_after_the_last_news(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []
    monkeypatch.setattr(TinyScheduler, "check_integrity", lambda scheduler: checks.append(scheduler.steps))
    monkeypatch.setattr(engine_loop, "IDLE_BEAT", 30.0)
    async with running() as bench:
        await bench.engine.submit("a")
        await until(lambda: News("a", 0) in bench.events)
        await bench.engine.call(lambda scheduler: None)
        assert not checks, "the turn that has news to tell is not held up"
    monkeypatch.setattr(engine_loop, "IDLE_BEAT", 0.02)
    async with running() as bench:
        await bench.engine.submit("a")
        await until(lambda: bool(checks) and checks[-1] == 1)


async def test_an_idle_engine_is_alive_and_a_stuck_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_loop, "IDLE_BEAT", 0.02)
    monkeypatch.setattr(pulse, "STEP_SECONDS", 0.3)
    monkeypatch.setattr(pulse, "TURN_SECONDS", 0.3)
    async with running() as bench:
        await bench.engine.submit("a")
        await until(lambda: News("a", 0) in bench.events)
        turned = bench.engine._pulse._mark[0]
        await until(lambda: bench.engine._pulse._mark[0] > turned + 0.4)
        assert bench.engine.alive, "it has nothing to do, but turns"
        bench.runner.hold()
        await bench.engine.submit("b")
        await until(lambda: not bench.engine.alive)
        bench.runner.gate.set()
        await until(lambda: bench.engine.alive)


def test_a_closed_event_loop_does_not_kill_the_thread() -> None:
    async def start() -> Bench:
        bench = Bench()
        bench.engine.start()
        bench.runner.hold()
        await bench.engine.submit("a", 2)
        await bench.until_waiting()
        return bench

    bench = asyncio.run(start())
    bench.engine._commands.put(None)
    bench.runner.gate.set()
    bench.engine._thread.join(10)
    assert not bench.engine._thread.is_alive()
    assert bench.scheduler.requests == {"a": 1}, "the step was finished, though nobody heard of it"


async def test_errors_that_mean_something_are_kept() -> None:
    async with running() as bench:
        bench.runner.error = InternalError("shadow")
        await bench.engine.submit("a")
        await until(lambda: bench.failures("a"))
        assert bench.of("a")[-1].error.message == "shadow"
