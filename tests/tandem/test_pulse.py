"""Whether an engine lives and whether its books are right."""

from __future__ import annotations

import pytest

from tandem.service import pulse


class Clock:
    """Stands for the module's `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pulse, "time", clock)
    return clock


def test_a_running_step_beats_longer_than_a_loop_that_hangs_between_steps(clock: Clock) -> None:
    beat = pulse.Pulse()
    clock.now += pulse.TURN_SECONDS
    assert not beat.beating
    with beat.step():
        clock.now += pulse.STEP_SECONDS - 1
        assert beat.beating
        clock.now += 2
        assert not beat.beating, "no step may take so long"
    assert beat.beating
    clock.now += pulse.TURN_SECONDS
    assert not beat.beating


def test_a_failed_step_is_over(clock: Clock) -> None:
    beat = pulse.Pulse()
    with pytest.raises(ValueError, match="step"), beat.step():
        raise ValueError("step")
    clock.now += pulse.TURN_SECONDS
    assert not beat.beating


def test_checks_follow_changes_at_most_once_a_second(clock: Clock) -> None:
    reports: list[bool] = []
    check = pulse.IdleCheck(lambda: None, reports.append)
    check.idle()
    assert reports == [], "nothing has changed"
    check.changed()
    check.idle()
    check.changed()
    check.idle()
    assert reports == [True]
    clock.now += pulse.CHECK_SECONDS
    check.idle()
    check.idle()
    assert reports == [True, True], "the change of before is not forgotten"


def test_wrong_books_are_told_and_raise_nothing() -> None:
    def wrong() -> None:
        raise AssertionError("a block is lost")

    reports: list[bool] = []
    check = pulse.IdleCheck(wrong, reports.append)
    check.changed()
    check.idle()
    assert reports == [False]
