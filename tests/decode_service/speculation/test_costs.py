"""The table of step costs, and how many drafts follow from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_service.speculation.calibration import ROWS, measure
from decode_service.speculation.costs import StepCosts
from decode_service.speculation.policy import lengths
from engine.fake import FakeRunner


def test_what_was_measured_counts_and_the_rest_lies_between() -> None:
    costs = StepCosts({1: 1.0, 16: 1.6, 17: 2.0, 32: 2.3})
    assert costs.line(1, 1)(16) == 2.0
    assert costs.seconds(1, 8) == pytest.approx(1.28)
    for _ in range(200):
        costs.measured(1, 1, 10.0)
        costs.measured(1, 9, 14.0)
    assert costs.seconds(1, 1) == pytest.approx(10.0, rel=0.05)
    assert costs.seconds(1, 9) == pytest.approx(14.0, rel=0.05)
    assert costs.seconds(1, 5) == pytest.approx(12.0, rel=0.05)
    assert costs.seconds(1, 16) == pytest.approx(14.0 * 1.6 / 1.32, rel=0.05)  # as the base has it from there on
    assert costs.seconds(32, 32) == 2.3  # another size of batch


def test_a_hiccup_counts_little_and_a_change_is_learned() -> None:
    costs = StepCosts()
    for _ in range(20):
        costs.measured(1, 1, 1.0)
    costs.measured(1, 1, 50.0)
    assert costs.seconds(1, 1) < 1.3
    for _ in range(60):
        costs.measured(1, 1, 3.0)
    assert costs.seconds(1, 1) == pytest.approx(3.0, rel=0.1)


def test_what_slows_everything_is_no_difference_between_rows() -> None:
    """A machine that others use takes twice as long for all; the rows that were not measured meanwhile do too."""
    costs = StepCosts({1: 1.0, 8: 1.4})
    for _ in range(50):
        costs.measured(1, 1, 1.0)
        costs.measured(1, 8, 1.4)
    for _ in range(30):
        costs.measured(1, 1, 2.0)
    assert costs.seconds(1, 8) / costs.seconds(1, 1) == pytest.approx(1.4, rel=0.1)
    assert costs.seconds(1, 1) == pytest.approx(2.0, rel=0.05)


def test_rows_are_never_free_however_little_was_measured() -> None:
    alone = StepCosts({1: 0.3}).line(1, 1)
    assert alone(15) == pytest.approx(0.3 * (1 + 15 * 0.05))
    hiccup = StepCosts({1: 0.9, 4: 0.32, 16: 0.4}).line(1, 1)
    assert hiccup(0) < hiccup(3) < hiccup(15) < hiccup(40)
    assert hiccup(0) == pytest.approx(0.32, rel=0.02)


def test_age_counts_steps_of_that_size_of_batch() -> None:
    costs = StepCosts()
    costs.measured(1, 4, 1.0)
    for _ in range(7):
        costs.measured(1, 1, 1.0)
        costs.measured(40, 40, 1.0)
    assert (costs.age(1, 4), costs.age(1, 1), costs.age(1, 9), costs.age(40, 40)) == (7, 0, 8, 0)


@given(
    st.dictionaries(st.integers(1, 80), st.floats(0.001, 1), max_size=5),
    st.lists(st.tuples(st.integers(1, 80), st.floats(0.001, 1)), max_size=8),
    st.integers(1, 200),
)
def test_a_cost_is_always_a_positive_number(base: dict[int, float], steps: list[tuple[int, float]], rows: int) -> None:
    costs = StepCosts(base)
    for count, seconds in steps:
        costs.measured(3, count, seconds)
    line = costs.line(3, rows)
    assert all(0 <= line(more) < float("inf") for more in range(30))


def test_drafts_pay_where_rows_are_cheap_and_likely() -> None:
    flat, steep = (lambda m: 1 + 0.02 * m), (lambda m: 1.0 + m)
    likely, unlikely = [0.9**i for i in range(1, 9)], [0.2**i for i in range(1, 9)]
    assert lengths([likely], 1, flat, 1.0) == [8]
    assert lengths([likely], 1, steep, 1.0) == [0]
    assert lengths([unlikely], 1, flat, 1.0) == [2]
    assert lengths([unlikely, likely], 2, flat, 1.0) == [1, 8]
    assert lengths([[0.03], likely], 2, lambda m: 1 + 0.1 * m, 1.0)[0] == 0


def test_a_step_of_a_tile_more_is_weighed_as_a_whole() -> None:
    """Rows that are free up to a bound, where a step comes: no draft beyond it unless enough follow."""

    def tiles(drafts: int) -> float:
        return 1.0 if drafts < 4 else 1.6

    assert lengths([[0.5] * 12], 2, tiles, 1.0) == [12]
    assert lengths([[0.3] * 6], 2, tiles, 1.0) == [3]


def test_a_small_gain_is_none() -> None:
    assert lengths([[0.05]], 1, lambda m: 1.0 + 0.04 * m, 1.0) == [1]
    assert lengths([[0.05]], 1, lambda m: 1.0 + 0.04 * m, 1.02) == [0]


def test_the_start_measures_each_number_of_rows_that_fits() -> None:
    runner = FakeRunner(16, 4)
    assert set(measure(runner, 16, 4, 1000)) == set(ROWS)
    assert sorted(measure(FakeRunner(3, 4), 3, 4, 10)) == [1, 2, 4, 8]
    assert {batch.num_tokens for batch in runner.batches} == set(ROWS)
