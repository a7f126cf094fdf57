"""The speculation bench without a stack: its sums, its page, and that a changed token is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.speculation import Measured, Round, check_equal
from bench.speculation_page import chart, table
from bench.speculation_work import CODE, Workload, shifting, workloads
from tandem.client.types import Choice, GenerateResult, Timings, Usage
from tandem.errors import TandemError


def answer(seconds: float, *, tokens: int = 101, drafted: int = 0, kept: int = 0, last: int = 7) -> GenerateResult:
    timings = Timings(0.0, 0.0, 0.0, seconds, seconds, 0, 0)
    choice = Choice(0, "", (*[1] * (tokens - 1), last), None)
    return GenerateResult("r", "m", (choice,), Usage(10, 0, tokens, drafted, kept), timings)


def measured() -> Measured:
    done = Measured(Workload("extract", (), 1, 101))
    for off, auto in ((2.0, 1.0), (2.0, 0.8)):
        done.rounds["off"].append(Round(9.0, [answer(off)]))
        done.rounds["auto"].append(Round(9.0, [answer(auto, drafted=100, kept=60)]))
    return done


def test_a_row_says_what_drafts_brought() -> None:
    row = measured().row()
    assert (row["off, tokens/s"], row["auto, tokens/s"]) == (50.0, 112.5)
    assert (row["auto / off"], row["least"]) == (2.25, 2.0)
    assert (row["drafts kept"], row["tokens a step"]) == ("60%", 2.46)
    text = table([row])
    assert text.splitlines()[2].startswith("| extract | 50.0 |")


def test_a_group_counts_by_its_whole_time() -> None:
    assert Round(2.0, [answer(1.0), answer(1.0)]).rate(at_once=2) == 101.0
    assert Round(9.0, [answer(1.0), answer(1.0)]).rate(at_once=1) == 100.0


def test_a_changed_token_is_an_error() -> None:
    done = measured()
    check_equal(done.rounds)
    first = done.rounds["auto"][-1].results[0]
    done.rounds["auto"][-1].results[0] = replace(first, choices=(replace(first.choices[0], token_ids=(1,)),))
    with pytest.raises(TandemError, match="changed a token"):
        check_equal(done.rounds)


def test_the_chart_has_a_point_a_task() -> None:
    text = chart([{"task": i, "off, tokens/s": 50.0, "auto, tokens/s": 50.0 + i} for i in range(3)])
    assert "0 --> 60" in text
    assert "line [50.0, 51.0, 52.0]" in text


def test_workloads_are_what_they_say() -> None:
    *single, chat, mixed = workloads(32)
    assert {each.at_once for each in single} == {1}
    assert len(chat.tasks) == len(mixed.tasks) == chat.at_once == 32
    assert sum(CODE in task.prompt for task in mixed.tasks) == 8
    kinds = [task.chat for task in shifting().tasks]
    assert kinds[0]
    assert kinds[-1]
    assert not all(kinds)
