"""bench.serve: how rates and ratios are made of what was seen."""

from __future__ import annotations

import io
import json
import sys

import pytest

from bench import offline
from bench.engine_alone import EngineAlone
from bench.points import Point, parse_point
from bench.serve import StreamTrace, compared, steady_rate, whole_rate
from tandem.errors import InternalError


def test_the_steady_rate_counts_only_while_all_streams_run() -> None:
    early = StreamTrace(0.0, [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)])
    late = StreamTrace(0.0, [(2.0, 1), (3.0, 1), (4.0, 1), (5.0, 1)])
    assert steady_rate([early, late]) == pytest.approx(2.0)  # 4 tokens after 2.0 and up to 4.0


def test_streams_that_never_run_together_have_no_rate() -> None:
    assert steady_rate([StreamTrace(0.0, [(1.0, 1), (2.0, 1)]), StreamTrace(0.0, [(3.0, 1), (4.0, 1)])]) == 0.0


def test_the_whole_rate_counts_prompts_and_ends() -> None:
    early = StreamTrace(0.0, [(1.0, 1), (2.0, 2)])
    late = StreamTrace(1.0, [(3.0, 1), (4.0, 4)])
    assert whole_rate([late, early]) == pytest.approx(2.0)


def test_a_ratio_is_taken_run_by_run() -> None:
    """A machine that slows down by half between two runs changes no ratio."""
    row = compared([900.0, 450.0, 880.0], [1000.0, 500.0, 1000.0])
    assert row["of_engine"] == 0.9
    assert row["of_engine_runs"] == [0.9, 0.9, 0.88]


def test_points_are_measured_as_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("tg8\npp512\n"))
    monkeypatch.setattr(offline, "measure", lambda driver, point: float(point.sequences))
    rows = list(offline.measure_asked(None))  # type: ignore[arg-type]
    assert [(row["point"], row["tokens_per_s"]) for row in rows] == [("tg8", 8.0), ("pp512", 1.0)]


class _Answering(EngineAlone):
    """A child that answers each line with its length, and ends at `stop`."""

    def __init__(self) -> None:
        super().__init__([parse_point("tg1")])
        script = "import sys\nfor line in sys.stdin:\n    if 'tg9' in line: break\n"
        script += f"    print({json.dumps(json.dumps({'tokens_per_s': 7.0}))}, flush=True)"
        self._command = [sys.executable, "-c", script]


async def test_the_engine_alone_answers_and_ends() -> None:
    async with _Answering() as alone:
        assert await alone.measure(Point("tg1", 1, 128, 128)) == 7.0
        assert await alone.measure(Point("tg8", 8, 128, 128)) == 7.0


async def test_a_dead_engine_is_an_error() -> None:
    async with _Answering() as alone:
        with pytest.raises(InternalError, match="has ended"):
            await alone.measure(Point("tg9", 9, 128, 128))
