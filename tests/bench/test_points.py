"""Names of points, and how often each is measured."""

from __future__ import annotations

import pytest

from bench.offline import blocks_for
from bench.points import Point, parse_point, parse_points, run_points
from tandem.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "sequences", "prompt_tokens", "output_tokens"),
    [("pp512", 1, 512, 0), ("pp8x512", 8, 512, 0), ("tg8", 8, 128, 128), ("tg8@4000", 8, 4000, 128)],
)
def test_names_say_what_is_measured(name: str, sequences: int, prompt_tokens: int, output_tokens: int) -> None:
    assert parse_point(name) == Point(name, sequences, prompt_tokens, output_tokens)


@pytest.mark.parametrize("name", ["", "tg", "tg0", "pp0", "pp0x512", "tg8@", "tg8@0", "tg8@4000x", "pp512@8"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="tg8@4000"):
        parse_point(name)


def test_a_long_point_is_measured_once_and_others_after_a_run_that_does_not_count() -> None:
    asked: list[str] = []

    def measure(point: Point) -> float:
        asked.append(point.name)
        return float(len(asked))

    rows = list(run_points(measure, parse_points("tg1,tg8@4000"), 3))
    assert asked == ["tg1"] * 4 + ["tg8@4000"]
    assert [(row["point"], row["tokens_per_s"], row["runs"]) for row in rows] == [("tg1", 3.0, 3), ("tg8@4000", 5.0, 1)]


def test_the_cache_holds_the_largest_point() -> None:
    assert blocks_for(parse_points("pp512,tg8@4000,tg32"), 16) == 8 * 258
