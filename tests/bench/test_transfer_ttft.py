"""bench.transfer_ttft: what is added, pair by pair."""

from __future__ import annotations

import pytest

from bench.serve import StreamTrace
from bench.transfer_ttft import Pair, misses, pair_of, row_of


def test_a_pair_holds_first_and_second_tokens() -> None:
    apart = StreamTrace(10.0, [(10.5, 1), (10.75, 1), (11.0, 1)])
    local = StreamTrace(20.0, [(20.25, 2), (21.0, 1)])
    assert pair_of(apart, local) == Pair((500.0, 250.0), (750.0, 250.0))
    with pytest.raises(ValueError, match="two tokens"):
        pair_of(StreamTrace(0.0, [(1.0, 1)]), local)


def test_differences_are_taken_pair_by_pair() -> None:
    """A machine that slows down by half between two pairs adds nothing."""
    pairs = [Pair((102, 100), (113, 108)), Pair((203, 200), (225, 216)), Pair((102, 100), (112, 108))]
    row = row_of(2048, pairs)
    assert (row["ttft_ms"], row["local_ms"]) == (102, 100)
    assert (row["added_ms"], row["added_percent"], row["second_added_ms"]) == (2, 2.0, 5)


def test_long_prompts_may_wait_a_little_longer() -> None:
    def of(tokens: int, added: float, local: float) -> list[str]:
        return misses([row_of(tokens, [Pair((local + added, local), (0, 0))])], chunk=512)

    assert of(2048, 4.9, 100) == []
    assert of(2048, 1.9, 10) == []
    assert of(2047, 50, 100) == []
    assert of(2048, 5.1, 100) == ["2048 tokens: the first token comes 5.1 ms (5.1 %) later"]
