"""The points that Tandem and its peers are measured at."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tandem.errors import ConfigError

DECODE_PROMPT_TOKENS = 128
DECODE_OUTPUT_TOKENS = 128
LONG_PROMPT_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Point:
    """`sequences` at once, each `prompt_tokens` in and `output_tokens` out (0: prefill only)."""

    name: str
    sequences: int
    prompt_tokens: int
    output_tokens: int

    @property
    def long(self) -> bool:
        """Prompts of more than 16,384 tokens in all: one run takes minutes."""
        return self.sequences * self.prompt_tokens > LONG_PROMPT_TOKENS

    @property
    def context_tokens(self) -> int:
        """Tokens of one sequence at its end."""
        return self.prompt_tokens + self.output_tokens


def parse_point(name: str) -> Point:
    """`pp512`, `pp8x512`, `tg8` or `tg8@4000`. Raises ConfigError for anything else."""
    if match := re.fullmatch(r"pp(?:([1-9]\d*)x)?([1-9]\d*)", name):
        return Point(name, int(match[1] or 1), int(match[2]), 0)
    if match := re.fullmatch(r"tg([1-9]\d*)(?:@([1-9]\d*))?", name):
        return Point(name, int(match[1]), int(match[2] or DECODE_PROMPT_TOKENS), DECODE_OUTPUT_TOKENS)
    raise ConfigError(
        f"unknown point {name!r}; allowed are ppN, ppBxN, tgB and tgB@N, for example pp512, pp8x512, tg8, tg8@4000"
    )


def parse_points(text: str) -> list[Point]:
    """A comma-separated list of points."""
    return [parse_point(name.strip()) for name in text.split(",") if name.strip()]


def run_points(measure: Callable[[Point], float], points: Sequence[Point], runs: int) -> Iterator[dict[str, object]]:
    """Measures each point `runs` times after one uncounted run; rows hold median, minimum and maximum.

    A long point is measured once, without the uncounted run.
    """
    for point in points:
        counted = 1 if point.long else runs
        if not point.long:
            measure(point)
        values = [measure(point) for _ in range(counted)]
        yield {
            "point": point.name,
            "tokens_per_s": round(statistics.median(values), 2),
            "min": round(min(values), 2),
            "max": round(max(values), 2),
            "runs": counted,
        }
