"""Workers that fail request after request get nothing new for a while; and what is told of workers and the queue."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest
from gateway_fakes import Cluster, Front, expected, tokens_of, until
from structlog.testing import capture_logs

from gateway.breaker import Breaker, Ejecting
from gateway.config import Patience


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def broken(clock: Clock, **settings: Any) -> Breaker:
    """Just opened, for one second."""
    breaker = Breaker(Ejecting(after=3, **settings), clock, draw=lambda: 0.5)
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    assert breaker.ready
    assert breaker.open() == 1.0
    return breaker


def test_only_failures_in_a_row_count() -> None:
    breaker = Breaker(Ejecting(after=2), Clock())
    for _ in range(5):
        assert not breaker.failed()
        assert not breaker.succeeded()
    assert breaker.closed


def test_zero_is_never() -> None:
    breaker = Breaker(Ejecting(after=0), Clock())
    assert not any(breaker.failed() for _ in range(100))


def test_one_request_at_a_time_tries_a_worker_that_failed() -> None:
    clock = Clock()
    breaker = broken(clock)
    assert not breaker.ready
    assert not breaker.succeeded(), "a request from before the failures"
    clock.now += 1.0
    assert breaker.ready
    breaker.taken()
    assert not breaker.ready
    breaker.given()
    assert breaker.ready
    assert breaker.succeeded()
    assert breaker.closed
    assert not breaker.failed(), "it counts from the beginning"


def test_it_waits_twice_as_long_each_time_but_not_for_ever() -> None:
    clock = Clock()
    breaker = broken(clock, most=5.0)
    waits = []
    for _ in range(4):
        assert not breaker.failed(), "a request from before it opened"
        clock.now += 10.0
        assert breaker.failed()
        waits.append(breaker.open())
    assert waits == [2.0, 4.0, 5.0, 5.0]


@pytest.mark.parametrize(("drawn", "seconds"), [(0.0, 0.8), (0.75, 1.1)])
def test_gateways_do_not_come_back_together(drawn: float, seconds: float) -> None:
    assert Breaker(Ejecting(), Clock(), draw=lambda: drawn).open() == pytest.approx(seconds)


def test_one_that_was_taken_back_opens_again_at_once() -> None:
    breaker = broken(Clock())
    breaker.take_back()
    assert breaker.ready
    assert breaker.failed()


@pytest.fixture
def quick(patience: Patience) -> dict[str, Any]:
    """Settings of a gateway."""
    return {"patience": replace(patience, ejecting=Ejecting(after=3, first=0.3, most=0.6))}


def metric(front: Front, name: str, **labels: str) -> float | None:
    return front.gateway.metrics.registry.get_sample_value(name, {"role": "gateway", **labels})


_starts = itertools.count(100, 64)


async def one(front: Front) -> None:
    """A prompt that nobody has cached."""
    start = next(_starts)
    call = front.stream(4, prompt=tuple(range(start, start + 64)))
    assert tokens_of(await front.collect(call)) == expected(4)


async def test_a_decode_worker_that_fails_is_ejected_and_comes_back(
    cluster: Cluster, serve: Any, quick: dict[str, Any]
) -> None:
    """Its load reports are well: only its requests tell. No client notices."""
    await cluster.start(prefill=1, decode=2)
    front = await serve(**quick)
    bad = front.gateway.pool.decode[0]
    fake = next(worker for worker in cluster.decode if worker.address == bad.address)
    fake.die_after = 0
    while bad.breaker.closed:
        await until(lambda: bad.ready)
        await one(front)
    aboard = len(fake.records)
    assert aboard == 3
    assert metric(front, "tandem_worker_ejections_total", worker_role="decode") == 1
    await until(lambda: metric(front, "tandem_workers", worker_role="decode", state="ejected") == 1)
    fake.die_after = None
    await one(front)
    assert len(fake.records) == aboard, "it is ejected"
    await until(lambda: bad.ready)
    await one(front)
    assert len(fake.records) == aboard + 1
    assert bad.breaker.closed


async def test_a_prefill_worker_that_fails_is_ejected(cluster: Cluster, serve: Any, quick: dict[str, Any]) -> None:
    await cluster.start(prefill=2, decode=1)
    front = await serve(**quick)
    bad = front.gateway.pool.prefill[0]
    fake = next(worker for worker in cluster.prefill if worker.address == bad.address)
    fake.die_after = 0
    while bad.breaker.closed:
        await until(lambda: bad.ready)
        await one(front)
    assert metric(front, "tandem_worker_failures_total", worker_role="prefill", worker=bad.address) == 3
    await one(front)
    assert len(fake.records) == 3


async def test_the_last_of_a_role_is_kept_and_that_is_said(
    cluster: Cluster,
    serve: Any,
    quick: dict[str, Any],
) -> None:
    """And one that was ejected is taken back when the others leave."""
    await cluster.start(prefill=1, decode=2)
    front = await serve(**quick)
    first, second = front.gateway.pool.decode
    with capture_logs() as lines:
        for worker in (first, second):
            for _ in range(3):
                worker.fault("broken", died=False)
    assert (first.breaker.closed, second.breaker.closed) == (False, True)
    assert [line["log_level"] for line in lines if "it is kept" in line["event"]] == ["error"]
    front.gateway.pool.set_addresses([cluster.prefill[0].address], [first.address])
    assert first.ready
    await one(front)


async def test_one_loss_of_many_requests_is_one_failure(cluster: Cluster, serve: Any, quick: dict[str, Any]) -> None:
    await cluster.start(prefill=1, decode=2)
    front = await serve(**quick)
    bad = front.gateway.pool.decode[0]
    for _ in range(8):
        bad.fault("the link broke", died=True)
        bad.failed()
    assert bad.failures == 1
    assert bad.breaker.closed


async def test_a_worker_that_left_takes_its_series_along(cluster: Cluster, serve: Any) -> None:
    await cluster.start(prefill=1, decode=2)
    front = await serve()
    prefill, (stays, leaves) = cluster.prefill[0].address, [worker.address for worker in cluster.decode]
    name = "tandem_worker_running_sequences"
    assert metric(front, name, worker_role="decode", worker=leaves) == 0
    front.gateway.pool.set_addresses([prefill], [stays])
    assert metric(front, name, worker_role="decode", worker=leaves) is None
    assert metric(front, name, worker_role="decode", worker=stays) == 0
    assert metric(front, "tandem_workers", worker_role="decode", state="ready") == 1


async def test_the_queue_is_told_in_tokens_and_in_seconds_of_one_worker(cluster: Cluster, serve: Any) -> None:
    await cluster.add_prefill()
    await cluster.add_decode(max_sequences=1)
    cluster.prefill[0].load.prefill_tokens_per_second = 32.0
    cluster.prefill[0].hold.clear()
    front = await serve()
    calls = [asyncio.ensure_future(front.collect(front.stream())) for _ in range(2)]
    await until(lambda: metric(front, "tandem_queued_prefill_tokens") == 64)
    assert metric(front, "tandem_queued_prefill_seconds") == 2.0
    cluster.prefill[0].hold.set()
    await asyncio.gather(*calls)
    assert metric(front, "tandem_queued_prefill_tokens") == 0
