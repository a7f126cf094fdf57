"""bench.goodput: what is counted, what arrives when, and the page; with streams that are made up."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from bench import goodput
from bench.goodput import Limits, flags_of, merge, parse_rates, row_of, write_result
from bench.goodput_page import page
from bench.load import Arrival, Mix, Outcome, Shape, good, parse_mix, poisson, run_load
from bench.serve import StreamTrace
from bench.stack import Stack
from tandem.errors import ConfigError, OverloadedError, UnavailableError

SHAPE = Shape(8, 3)
MIX = Mix("8:3", (SHAPE,))


def outcome(first: float, gap: float, tokens: int = 3) -> Outcome:
    return Outcome(SHAPE, StreamTrace(10.0, [(10.0 + first + gap * i, 1) for i in range(tokens)]))


@pytest.mark.parametrize(
    ("first", "gap", "tokens", "counts"),
    [(0.5, 0.05, 3, True), (1.5, 0.05, 3, False), (0.5, 0.2, 3, False), (0.5, 0.05, 2, False), (0.5, 0.05, 0, False)],
)
def test_good_is_complete_and_in_time(first: float, gap: float, tokens: int, counts: bool) -> None:
    assert good(outcome(first, gap, tokens), ttft=1.0, itl=0.1) is counts


def test_an_error_is_not_good() -> None:
    failed = outcome(0.1, 0.01)
    failed.error = "OverloadedError"
    assert not good(failed, ttft=1.0, itl=0.1)


def test_arrivals_are_of_the_seed_and_of_the_rate() -> None:
    arrivals = poisson(MIX, rate=5.0, seconds=400.0, seed=1)
    assert arrivals == poisson(MIX, rate=5.0, seconds=400.0, seed=1)
    assert arrivals != poisson(MIX, rate=5.0, seconds=400.0, seed=2)
    assert 1800 < len(arrivals) < 2200
    assert all(0 < arrival.at < 400 for arrival in arrivals)


def test_a_mix_has_all_its_shapes() -> None:
    mix = parse_mix("128:16+2048:64")
    shapes = {arrival.shape for arrival in poisson(mix, 10.0, 10.0, 1)}
    assert shapes == {Shape(128, 16), Shape(2048, 64)}


@pytest.mark.parametrize("text", ["512", "512:", ":3", "0:3", "a:b", "1:2+", ""])
def test_a_bad_mix_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--mixes"):
        parse_mix(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1,,2"])
def test_bad_rates_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--rates"):
        parse_rates(text)


def test_both_ways_have_the_same_threads() -> None:
    apart, together = flags_of("disaggregated", 4), flags_of("aggregated", 4)
    assert int(apart[apart.index("--threads") + 1]) * 2 == int(together[together.index("--threads") + 1]) == 4
    with pytest.raises(ConfigError, match="--threads"):
        flags_of("disaggregated", 3)


async def test_failures_are_outcomes_and_the_rest_goes_on() -> None:
    async def send(arrival: Arrival, trace: StreamTrace) -> None:
        if arrival.seed:
            raise OverloadedError("full")
        trace.arrivals = [(trace.started + 0.1, 3)]

    seen: list[Outcome] = []
    outcomes = await run_load([Arrival(0.0, SHAPE, 0), Arrival(0.0, SHAPE, 1)], send, seen.append)
    assert [(o.complete, o.error) for o in outcomes] == [(True, ""), (False, "OverloadedError")]
    assert len(seen) == 2
    row = row_of("aggregated", MIX, 1.0, 2.0, Limits(1.0, 0.1), outcomes)
    assert (row["requests"], row["failed"], row["good"], row["goodput"]) == (2, 1, 1, 0.5)


def rows() -> list[goodput.Row]:
    limits, fine, late = Limits(1.0, 0.1), outcome(0.5, 0.05), outcome(2.0, 0.05)
    return [
        row_of(way, MIX, rate, 1.0, limits, [fine] * (2 if way == "disaggregated" else 1) + [late])
        for rate in (1.0, 2.0)
        for way in goodput.WAYS
    ]


def test_results_are_merged_and_the_last_counts(tmp_path: Path) -> None:
    arguments = argparse.Namespace(threads=2, seconds=1.0, seed=1, ttft=1.0, itl=0.1)
    first = json.loads(write_result(tmp_path / "a", arguments, rows()).read_text())
    second = json.loads(write_result(tmp_path / "b", arguments, [{**rows()[0], "goodput": 9.0}]).read_text())
    facts, merged = merge([first, second])
    assert [(row["rate"], row["way"], row["goodput"]) for row in merged] == [
        (1.0, "aggregated", 1.0),
        (1.0, "disaggregated", 9.0),
        (2.0, "aggregated", 1.0),
        (2.0, "disaggregated", 2.0),
    ]
    text = page(facts, merged)
    assert "Of 2 loads, disaggregated has the higher goodput in 2, aggregated in 0." in text
    assert "    line [9.000, 2.000]\n    line [1.000, 1.000]" in text
    for key, other in (
        ("threads", 4),
        ("seconds", 2.0),
        ("seed", 2),
        ("version", "another"),
        ("limits", {"ttft": 2.0}),
    ):
        unlike = {**second, "facts": {**second["facts"], key: other}}
        with pytest.raises(ConfigError, match=f"not measured alike: {key} is"):
            merge([first, unlike])
    merge([first, second])


def test_ways_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes first at every second load, in a stack of its own."""
    started: list[list[str]] = []

    class FakeStack:
        gateway = "127.0.0.1:1"

        def __init__(self, flags: list[str]) -> None:
            started.append(flags)

        def __enter__(self) -> FakeStack:
            return self

        def __exit__(self, *_: object) -> None:
            """Stops."""

    async def measured(*_: object) -> list[Outcome]:
        return []

    monkeypatch.setattr(goodput, "Stack", FakeStack)
    monkeypatch.setattr(goodput, "measure", measured)
    arguments = argparse.Namespace(
        mixes=[MIX],
        rates=[1.0, 2.0, 4.0],
        ways=list(goodput.WAYS),
        seconds=1.0,
        seed=1,
        ttft=1.0,
        itl=0.1,
        threads=2,
        model="m",
    )
    with Progress(disable=True) as progress:
        rows = list(goodput.run_loads(arguments, progress))
    apart, together = goodput.WAYS
    assert [row["way"] for row in rows] == [apart, together, together, apart, apart, together]
    assert [row["rate"] for row in rows] == [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert len(started) == 6


def test_a_stack_is_stopped_and_its_failure_is_told() -> None:
    ready = "print('ready gateway=127.0.0.1:1 http=127.0.0.1:2', flush=True); import time; time.sleep(600)"
    with Stack([], [sys.executable, "-c", ready]) as stack:
        assert stack.gateway == "127.0.0.1:1"
        (process,) = stack.processes()
    assert not process.is_running()
    with (
        pytest.raises(UnavailableError, match="no such model"),
        Stack([], [sys.executable, "-c", "import sys; sys.exit('no such model')"]),
    ):
        pass
