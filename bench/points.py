"""The points that Tandem and its peers are measured at."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tandem.errors import ConfigError

DECODE_PROMPT_TOKENS = 128
DECODE_OUTPUT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Point:
    """`sequences` at once, each `prompt_tokens` in and `output_tokens` out (0: prefill only)."""

    name: str
    sequences: int
    prompt_tokens: int
    output_tokens: int


def parse_point(name: str) -> Point:
    """`pp512`, `pp8x512` or `tg8`. Raises ConfigError for anything else."""
    if match := re.fullmatch(r"pp(?:(\d+)x)?(\d+)", name):
        return Point(name, int(match[1] or 1), int(match[2]), 0)
    if match := re.fullmatch(r"tg(\d+)", name):
        return Point(name, int(match[1]), DECODE_PROMPT_TOKENS, DECODE_OUTPUT_TOKENS)
    raise ConfigError(f"unknown point {name!r}; allowed are ppN, ppBxN and tgB, for example pp512, pp8x512, tg8")


def parse_points(text: str) -> list[Point]:
    """A comma-separated list of points."""
    return [parse_point(name.strip()) for name in text.split(",") if name.strip()]
