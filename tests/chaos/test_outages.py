"""Which streams of a chaos run may fail, and how."""

from __future__ import annotations

from typing import Any

import pytest
from chaos_outages import LATE, Outages
from chaos_streams import DEADLINE, Clients

from tandem.errors import DataCorruptionError, DeadlineError, InternalError, UnavailableError

GONE = UnavailableError("no decode worker is ready")


class Time:
    """A clock, and which roles are up."""

    def __init__(self) -> None:
        self.now = 100.0
        self.up = {"prefill": True, "decode": True}
        self.outages = Outages(lambda: self.up, lambda: self.now)

    def passes(self, seconds: float, **up: bool) -> None:
        self.up.update(up)
        self.outages.look()
        self.now += seconds
        self.outages.look()


@pytest.fixture
def time() -> Time:
    return Time()


def test_nobody_may_fail_while_each_role_has_somebody(time: Time) -> None:
    time.passes(3 * DEADLINE)
    assert not time.outages.excuse(GONE, time.now - DEADLINE, DEADLINE)


def test_an_outage_longer_than_the_deadline_excuses(time: Time) -> None:
    time.passes(DEADLINE - 1, decode=False)
    assert not time.outages.excuse(GONE, 100.0, DEADLINE)
    time.passes(1)
    assert time.outages.excuse(GONE, 100.0, DEADLINE)
    assert time.outages.excuse(DeadlineError("too late"), 100.0, DEADLINE)


def test_two_short_ones_do_not(time: Time) -> None:
    time.passes(DEADLINE - 1, decode=False)
    time.passes(1, decode=True)
    time.passes(DEADLINE - 1, decode=False, prefill=True)
    assert not time.outages.excuse(GONE, time.now - DEADLINE, DEADLINE)


def test_only_who_lived_through_it_in_time_and_with_the_right_code(time: Time) -> None:
    time.passes(DEADLINE, prefill=False)
    began = time.now - DEADLINE
    for error in (InternalError("a bug"), DataCorruptionError("a byte"), AssertionError("two ends")):
        assert not time.outages.excuse(error, began, DEADLINE)
    time.passes(LATE, prefill=True)
    assert time.outages.excuse(GONE, began, DEADLINE)
    time.passes(0.1)
    assert not time.outages.excuse(GONE, began, DEADLINE)
    assert not time.outages.excuse(GONE, time.now, DEADLINE), "it began behind the outage"


@pytest.mark.parametrize("lasting", [True, False])
async def test_a_run_counts_excused_streams_apart(time: Time, monkeypatch: pytest.MonkeyPatch, lasting: bool) -> None:
    async def fail(*_: Any) -> Any:
        raise GONE

    monkeypatch.setattr("chaos_streams.answer_of", fail)
    monkeypatch.setattr("chaos_streams.FAILED_PAUSE", 0.0)
    time.passes(DEADLINE if lasting else 1.0, decode=False)
    time.passes(0.0, decode=True)
    clients = Clients(["a"], [{}], [{}], seed=1, outages=time.outages)
    await clients._compare(None, 0)  # type: ignore[arg-type]
    assert (clients.excused, len(clients.failures)) == ((1, 0) if lasting else (0, 1))
