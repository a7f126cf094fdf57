"""Hidden states kept for EAGLE heads: the latest of each output, without those of drafts that weren't kept."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import SampleSpec, Slice
from engine.features import FeatureStore
from engine.models.meta import Taps
from tandem.record import SamplingParams


def rows(start: int, count: int, mark: float = 0.0) -> torch.Tensor:
    """Rows that say their position."""
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].repeat(1, 3) + mark


def part(start: int, count: int, output: int | None = 0, draws: int = 0, request: str = "r") -> Slice:
    specs = [SampleSpec(index, SamplingParams(), 0) for index in range(draws)]
    return Slice(request, [0] * count, start, [], specs, output=output)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=20))
def test_the_latest_rows_are_there(limit: int, steps: list[tuple[int, int]]) -> None:
    """Steps of some rows, of which some turn out not to count; each step marks its rows."""
    store, known, first = FeatureStore((), limit), 0, 0
    truth: list[float] = []
    for mark, (count, kept) in enumerate(steps):
        store.saw([part(known, count)], Taps((), [rows(known, count, 0.01 * mark)]))
        first = max(first, known + count - limit)  # rows that turn out not to count push older ones out too
        kept = min(count, max(1, kept))
        truth += [known + i + 0.01 * mark for i in range(kept)]
        known += kept
        first = min(first, known)
        base, end = store.trim("r", 0, known)
        assert (base, end) == (first, known)
        assert torch.allclose(store.rows("r", 0, base, end)[:, 0], torch.tensor(truth[base:end]))


def test_a_prompts_rows_go_to_all_outputs() -> None:
    store = FeatureStore((1, 2))
    store.saw([part(0, 4, None)], Taps((1, 2), [rows(0, 4), rows(0, 4, 0.5)]))
    store.saw([part(4, 2, None, draws=2)], Taps((1, 2), [rows(4, 2), rows(4, 2, 0.5)]))
    store.saw([part(6, 1, 0), part(6, 1, 1)], Taps((1, 2), [torch.cat([rows(6, 1), rows(6, 1, 0.25)])] * 2))
    for output, mark in ((0, 0.0), (1, 0.25)):
        assert store.trim("r", output, 7) == (0, 7)
        found = store.rows("r", output, 0, 7)
        assert found.shape == (7, 6)
        assert found[5].tolist() == [5.0] * 3 + [5.5] * 3
        assert found[6, 0] == 6 + mark
    store.drop("r", 0)
    assert store.end("r", 0) == 0
    assert store.end("r", 1) == 7


def test_rows_after_a_gap_begin_anew() -> None:
    """A prefix that came from a cache, or from another worker, has no rows."""
    store = FeatureStore(())
    store.saw([part(3, 2), part(8, 1, request="other")], Taps((), [torch.cat([rows(3, 2), rows(8, 1)])]))
    store.saw([part(9, 1)], Taps((), [rows(9, 1)]))
    assert store.trim("r", 0, 10) == (9, 10)
    assert store.trim("other", 0, 9) == (8, 9)
    assert store.trim("nobody", 0, 5) == (5, 5)
