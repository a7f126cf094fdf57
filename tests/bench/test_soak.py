"""bench.soak: what counts as worse, with streams and processes that are made up."""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

import psutil
import pytest

from bench.load import Arrival, Outcome, Shape, parse_mix
from bench.serve import StreamTrace
from bench.soak import complaints, grown, held_by, soak, tenths


def row(itl: float = 20.0, rss: int = 500, fds: int = 30, process: str = "1 gateway") -> dict[str, Any]:
    times = {"p50": itl, "p99": 2 * itl}
    return {"ttft_ms": times, "itl_ms": times, "held": {process: {"rss_mib": rss, "fds": fds, "threads": 9}}}


def test_the_same_again_is_good_and_so_is_better() -> None:
    assert complaints(row(), row(), 0.1) == []
    assert complaints(row(), row(itl=10.0, rss=400), 0.1) == []


@pytest.mark.parametrize(
    ("after", "says"),
    [(row(itl=23.0), "itl_ms p50"), (row(rss=600), "rss_mib"), (row(fds=60), "fds"), (row(process="2 x"), "other")],
)
def test_whatever_grew_is_told(after: dict[str, Any], says: str) -> None:
    assert any(says in complaint for complaint in complaints(row(), after, 0.1))


def test_small_things_may_come_and_go() -> None:
    assert grown("fds", 10, 14, slack=0.1, floor=8) == []
    assert grown("fds", 10, 19, slack=0.1, floor=8) == ["fds grew from 10 to 19"]
    assert grown("rss", 1000, 1050, slack=0.1, floor=16) == []


def test_tenths_are_by_arrival() -> None:
    outcomes = [Outcome(Shape(1, 1), StreamTrace(100.0 + at)) for at in (0.0, 9.0, 11.0, 89.0, 91.0)]
    first, last = tenths(outcomes, 100.0, 100.0)
    assert [outcome.trace.started for outcome in first] == [100.0, 109.0]
    assert [outcome.trace.started for outcome in last] == [191.0]


def test_this_process_holds_something() -> None:
    (held,) = held_by([psutil.Process(os.getpid())]).values()
    assert held["rss_mib"] > 1
    assert held["fds"] >= 3
    assert held["threads"] >= 1


@pytest.mark.parametrize("broken", [False, True])
async def test_a_run_is_judged(broken: bool) -> None:
    """Streams whose times are made up: when broken, the later ones lose a token."""
    sent = 0

    async def send(arrival: Arrival, trace: StreamTrace) -> None:
        nonlocal sent
        sent += 1
        await asyncio.sleep(0.002)  # so that the calibration finds a load that one process can make
        tokens = arrival.shape.output_tokens - (broken and sent > 60)
        trace.arrivals = [(trace.started + 0.1 + 0.01 * i, 1) for i in range(tokens)]

    told: list[Any] = []
    arguments = argparse.Namespace(mix=parse_mix("8:4"), streams=2, calibrate=0.01, seed=1, minutes=0.01, slack=0.1)
    held = {"1 gateway": {"rss_mib": 100, "fds": 10, "threads": 4}}
    found = await soak(send, lambda: held, arguments, told.append)
    assert [line["phase"] for line in told] == ["calibration", "first tenth", "last tenth"]
    assert any("failed" in complaint for complaint in found) is broken
