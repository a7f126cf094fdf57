from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prefill_scheduling import VOCAB, expected_tokens, make_record
from prefill_serving import GatedRunner, until

from engine.block_pool import BlockPool
from prefill_service.config import SchedulerConfig
from prefill_service.engine_loop import EngineLoop
from prefill_service.events import Event, Sampled
from prefill_service.scheduler import Scheduler
from tandem.errors import InvalidRequestError
from worker.events import Failed


class Bench:
    """An engine loop whose events are kept."""

    def __init__(self, chunk: int = 8) -> None:
        config = SchedulerConfig(max_step_tokens=chunk, max_sequences=4, max_context=512, vocab_size=VOCAB)
        self.scheduler = Scheduler(config, BlockPool(64, 4))
        self.runner = GatedRunner(64, 4, vocab_size=VOCAB)
        self.events: list[Event] = []
        self.loads = 0
        self.engine = EngineLoop(
            "engine", self.scheduler, self.runner, on_events=self.events.extend, on_load=self._count
        )

    def _count(self, _load: object) -> None:
        self.loads += 1

    def of(self, key: str, kind: type) -> list[Any]:
        return [event for event in self.events if event.key == key and isinstance(event, kind)]


@asynccontextmanager
async def running(chunk: int = 8) -> AsyncIterator[Bench]:
    bench = Bench(chunk)
    bench.engine.start()
    try:
        yield bench
    finally:
        bench.runner.free()
        await bench.engine.stop()


async def test_submit_computes_and_release_frees() -> None:
    async with running() as bench:
        record = make_record(20, seed=1)
        admission = await bench.engine.submit("a", record)
        assert (admission.cached_tokens, admission.waiting_requests) == (0, 1)
        await until(lambda: bool(bench.of("a", Sampled)))
        assert bench.of("a", Sampled)[0].deltas[0].token_ids == [expected_tokens(record)[0]]
        assert bench.engine.steps == 3
        assert bench.engine.prefill_rate > 0
        bench.engine.release("a")
        await until(lambda: bench.engine.load.free_blocks == 64)
        bench.scheduler.check_integrity()


async def test_a_release_in_the_same_turn_comes_after_its_submit() -> None:
    async with running() as bench:
        answer = bench.engine.submit("a", make_record(20, seed=1))
        bench.engine.release("a")
        await answer
        await until(lambda: len(bench.scheduler) == 0 and bench.engine.load.free_blocks == 64)


async def test_a_poison_step_fails_those_aboard_only() -> None:
    async with running(chunk=4) as bench:
        bench.runner.hold()
        await bench.engine.submit("poison", make_record(4, seed=1))
        await until(bench.runner.waiting.is_set)
        other = bench.engine.submit("other", make_record(4, seed=2))
        bench.runner.fail_steps = 1
        bench.runner.free()
        await other
        await until(lambda: bool(bench.of("other", Sampled)))
        assert "on fire" in bench.of("poison", Failed)[0].error.message
        assert bench.of("other", Failed) == []


@pytest.mark.parametrize("method", ["schedule", "update", "load"])
async def test_a_bug_of_the_scheduler_fails_requests_not_the_thread(method: str) -> None:
    async with running() as bench:
        original = getattr(bench.scheduler, method)
        bench.runner.hold()
        await bench.engine.submit("a", make_record(12, seed=1))
        await until(bench.runner.waiting.is_set)
        setattr(bench.scheduler, method, _raise(RuntimeError("bug"), then=original))
        bench.runner.free()
        await until(lambda: bool(bench.of("a", Failed)))
        assert "bug" in bench.of("a", Failed)[0].error.message
        bench.engine.release("a")
        await bench.engine.submit("b", make_record(4, seed=2))
        await until(lambda: bool(bench.of("b", Sampled)))
        bench.scheduler.check_integrity()


def _raise(error: Exception, then: Any = None) -> Any:
    """A function that raises the first time."""
    calls = []

    def run(*arguments: Any) -> Any:
        if then is None or not calls:
            calls.append(1)
            raise error
        return then(*arguments)

    return run


async def test_errors_of_a_submission_are_its_own() -> None:
    async with running() as bench:
        with pytest.raises(InvalidRequestError):
            await bench.engine.submit("a", make_record([]))
        bench.scheduler.release = _raise(RuntimeError("bug"), then=bench.scheduler.release)
        bench.engine.release("a")
        await bench.engine.submit("b", make_record(4, seed=2))
        await until(lambda: bool(bench.of("b", Sampled)))


async def test_a_submission_nobody_waits_for_any_more() -> None:
    async with running() as bench:
        bench.runner.hold()
        await bench.engine.submit("a", make_record(4, seed=1))
        await until(bench.runner.waiting.is_set)
        submission = bench.engine.submit("b", make_record(4, seed=2))
        await until(lambda: bench.engine._commands.qsize() == 1)
        submission.cancel()
        bench.engine.release("b")
        bench.runner.free()
        await until(lambda: bool(bench.of("a", Sampled)))
        bench.engine.release("a")
        await until(lambda: bench.engine.load.free_blocks == 64 and len(bench.scheduler) == 0)
        assert bench.of("b", Sampled) == []
