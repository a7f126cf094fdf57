"""Arrivals to replay: a synthetic day with bursts, or a file."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import ConfigError

FIELDS = ("at", "prompt_tokens", "output_tokens")
MOST_PROMPT, MOST_OUTPUT = 16_000, 2_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: `at` in seconds from the start."""

    at: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Day:
    """A synthetic trace. Rates are requests a second; the day begins and ends at its quietest."""

    hours: float = 8.0
    quiet: float = 0.3
    busy: float = 3.0
    bursts: int = 2
    burst_factor: float = 2.0
    burst_seconds: float = 600.0
    prompt_tokens: float = 1500.0
    output_tokens: float = 300.0
    spread: float = 0.8
    """Of the logarithms of both lengths."""


def synthetic(day: Day, seed: int) -> list[Arrival]:
    """Poisson arrivals whose rate follows a cosine, and is multiplied in bursts that begin at random; the same for the
    same seed.
    """
    draw = random.Random(seed)
    seconds = day.hours * 3600
    starts = [draw.uniform(0.2, 0.8) * seconds for _ in range(day.bursts)]
    most = day.busy * max(1.0, day.burst_factor)
    arrivals, at = [], draw.expovariate(most)
    while at < seconds:
        if draw.random() * most < rate_at(day, starts, at):
            prompt = _length(draw, day.prompt_tokens, day.spread, MOST_PROMPT)
            arrivals.append(Arrival(at, prompt, _length(draw, day.output_tokens, day.spread, MOST_OUTPUT)))
        at += draw.expovariate(most)
    return arrivals


def rate_at(day: Day, bursts: Sequence[float], at: float) -> float:
    """Requests a second at `at`; `bursts` are the seconds at which they begin."""
    wave = (1 - math.cos(2 * math.pi * at / (day.hours * 3600))) / 2
    inside = any(start <= at < start + day.burst_seconds for start in bursts)
    return (day.quiet + (day.busy - day.quiet) * wave) * (day.burst_factor if inside else 1.0)


def _length(draw: random.Random, mean: float, spread: float, most: int) -> int:
    """Lognormal with that mean."""
    return max(1, min(most, round(draw.lognormvariate(math.log(mean) - spread**2 / 2, spread))))


def read_trace(path: Path) -> list[Arrival]:
    """CSV with a header of FIELDS, in any order of time. Raises ConfigError."""
    try:
        with path.open(newline="") as file:
            rows = csv.DictReader(file)
            if set(rows.fieldnames or ()) != set(FIELDS):
                raise ConfigError(f"--trace: {path} must begin with the line {','.join(FIELDS)}")
            found = [Arrival(float(r["at"]), int(r["prompt_tokens"]), int(r["output_tokens"])) for r in rows]
    except (OSError, ValueError, TypeError) as exc:
        raise ConfigError(f"--trace: {path} can't be read: {exc}") from exc
    if not found or any(a.at < 0 or a.prompt_tokens < 1 or a.output_tokens < 1 for a in found):
        raise ConfigError(f"--trace: {path} must hold requests of at least one token each way, at 0 s or later")
    return sorted(found, key=lambda arrival: arrival.at)
