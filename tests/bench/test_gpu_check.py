"""What `bench.gpu_check` says, and that it ends in time. It is not imported itself: it turns the interpreter off."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.gpu_parity import Check, parity
from bench.gpu_report import Report, table
from bench.gpu_speed import Case, Rates
from bench.gpu_steps import Way, run_way, ways
from bench.points import parse_points
from bench.random_weights import SHAPES


class Clock:
    """Seconds that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def report(tmp_path: Path, clock: Clock) -> Iterator[Report]:
    with Report(tmp_path / "folder" / "rows.jsonl", 300.0, clock=clock) as made:
        yield made


def test_rows_are_in_the_file_and_on_standard_output_at_once(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.say(torch="2.11", triton="3.6")
    report.say(case="a", ms=1.0)
    written = (tmp_path / "folder" / "rows.jsonl").read_text()
    assert [json.loads(line) for line in written.splitlines()] == report.rows
    assert capsys.readouterr().out == written


def test_nothing_is_begun_without_time(report: Report, clock: Clock) -> None:
    clock.now += 299
    assert not report.skips("short")
    assert report.skips("long", 60.0)
    clock.now += 5
    assert report.skips("short")
    assert report.rows == [
        {"skipped": "long", "left_s": 1, "needed_s": 60.0},
        {"skipped": "short", "left_s": 0, "needed_s": 0.0},
    ]
    assert report.skipped == 2


def test_checks_end_where_the_time_does_and_failures_are_counted(report: Report, clock: Clock) -> None:
    def late() -> tuple[torch.Tensor, torch.Tensor]:
        clock.now += 400
        return torch.zeros(1), torch.ones(1)

    def broken() -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("no such kernel")

    same = Check("same", lambda: (torch.ones(1), torch.ones(1)), 0.0)
    wanted = [same, Check("broken", broken, 0.0), Check("late", late, 0.5), same]
    assert parity(((torch.float16, check) for check in wanted), report) == 2
    assert [row.get("ok") for row in report.rows] == [True, False, False, None]
    assert report.rows[-1]["skipped"] == "parity from same in torch.float16 on"
    assert "no such kernel" in str(report.rows[1]["failure"])


def test_a_case_says_what_it_achieved_beside_its_floor() -> None:
    rates = Rates(gb_per_s=1000.0, tflops=100.0)
    moved = Case("copy", lambda: None, nbytes=2e9).row(4.0, rates)
    assert moved == {"case": "copy", "ms": 4.0, "floor_ms": 2.0, "ratio": 2.0, "gb_per_s": 500.0, "tflops": 0.0}
    product = Case("8 bits", lambda: None, 1e6, operations=4e11, speed=2).row(4.0, rates)
    assert (product["floor_ms"], product["tflops"]) == (2.0, 100.0)


def test_the_table_has_kernels_and_steps(report: Report) -> None:
    assert table(report.rows) == ""
    report.say(case="gated", ms=0.2, floor_ms=0.1, ratio=2.0, gb_per_s=2000.0, tflops=0.0)
    report.say(case="broken", ok=False)
    report.say(way="graphs", point="tg1@1024", tokens_per_s=207.0, step_ms=4.8, replay_ms=0.03)
    assert table(report.rows).splitlines() == [
        "| case | ms | floor_ms | ratio | gb_per_s | tflops |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| gated | 0.2 | 0.1 | 2.0 | 2000.0 | 0.0 |",
        "",
        "| point | tokens_per_s | step_ms | floor_ms | host_ms | replay_ms | tflops |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| tg1@1024, graphs | 207.0 | 4.8 |  |  | 0.03 |  |",
    ]


def test_rows_of_a_process_are_reported_and_its_status_counts(report: Report) -> None:
    assert run_way(Way("good", ("-c", 'print(\'{"point": "tg1"}\\nnoise\')')), report)
    assert not run_way(Way("bad", ("-c", "raise SystemExit(3)")), report)
    assert report.rows == [
        {"way": "good", "point": "tg1"},
        {"steps": "bad", "ok": False, "failure": "status 3"},
    ]


def test_a_process_that_takes_too_long_is_killed_and_a_row(
    report: Report, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not run_way(Way("hangs", ("-c", "import signal; signal.pause()")), report, 0.1)
    assert "killed: it took longer than" in str(report.rows[0]["failure"])

    def slow(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout, b'{"point": "tg1"}\n{"poi')

    monkeypatch.setattr(subprocess, "run", slow)
    clock.now += 200
    assert not run_way(Way("slow", ()), report)
    assert report.rows[1] == {"way": "slow", "point": "tg1"}
    assert report.rows[2]["failure"] == "killed: it took longer than 100 s"
    clock.now += 50
    assert run_way(Way("late", ()), report)
    assert report.rows[3]["skipped"] == "steps, late"


def test_the_ways_ask_for_points_that_their_models_have() -> None:
    assert [way.name for way in ways(False)] == ["graphs", "graphs, long contexts", "no graphs"]
    for way in ways(True):
        given = dict(zip(way.arguments, way.arguments[1:], strict=False))
        shape = SHAPES[given["--model"].removeprefix("random:")]
        assert all(point.context_tokens <= shape.max_context for point in parse_points(given["--points"]))
