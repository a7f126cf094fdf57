"""What is measured of drafts: by comparing them with what comes, whether they were verified or not."""

from __future__ import annotations

import pytest

from decode_service.speculation.acceptance import ANY, Acceptance, Kind, stretch
from decode_service.speculation.proposer import OutputKey

KEY, OTHER = OutputKey("a", 0), OutputKey("b", 0)
SURE, UNSURE = Kind("ngram", 7), Kind("ngram", 0)


def test_a_kind_that_is_always_right_is_trusted_and_one_that_is_wrong_is_not() -> None:
    rates = Acceptance()
    for _ in range(60):
        rates.compare(KEY, SURE, [1, 2, 3, 4])
        rates.saw(KEY, [1, 2])
        rates.saw(KEY, [3, 4])
        rates.compare(KEY, UNSURE, [1, 2])
        rates.saw(KEY, [9, 2])
    assert rates.survival(KEY, SURE, 4)[3] > 0.9
    assert rates.survival(KEY, UNSURE, 2)[0] < 0.1
    assert 0.4 < rates.survival(KEY, Kind("ngram", ANY), 1)[0] < 0.6


def test_chances_fall_along_a_draft() -> None:
    chances = Acceptance().survival(KEY, SURE, 12)
    assert chances == sorted(chances, reverse=True)
    assert chances[0] == 0.5


def test_a_draft_is_compared_until_it_is_wrong() -> None:
    rates = Acceptance()
    rates.compare(KEY, SURE, [1, 2, 3, 4])
    rates.compare(KEY, UNSURE, [8, 8])  # the first is still being compared
    rates.saw(KEY, [1])
    rates.saw(KEY, [2, 7, 4])
    first, second, third, *_ = rates.survival(KEY, SURE, 4)
    assert first > 0.5
    assert second / first > 0.5
    assert third / second < 0.5
    assert rates.survival(KEY, UNSURE, 1) == [0.5]


def test_outputs_share_what_they_see_and_differ_where_they_saw_more_themselves() -> None:
    rates = Acceptance()
    for _ in range(50):
        rates.compare(KEY, SURE, [1])
        rates.saw(KEY, [1])
        rates.compare(OTHER, SURE, [1])
        rates.saw(OTHER, [2])
    (good,), (bad,), (new,) = (rates.survival(key, SURE, 1) for key in (KEY, OTHER, OutputKey("c", 0)))
    assert bad < 0.2 < new < 0.8 < good
    rates.finished(OTHER)
    rates.finished(OTHER)
    assert rates.survival(OTHER, SURE, 1)[0] == pytest.approx(new)


def test_old_trials_fade() -> None:
    rates = Acceptance()
    for token in [1] * 200 + [2] * 60:
        rates.compare(KEY, SURE, [1])
        rates.saw(KEY, [token])
    assert rates.survival(KEY, SURE, 1)[0] < 0.25


def test_far_places_are_measured_together() -> None:
    assert [stretch(place) for place in (0, 1, 2, 3, 4, 7, 8, 40)] == [0, 1, 2, 2, 3, 3, 4, 4]
