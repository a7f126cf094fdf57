"""The part of a driver that is the same for every peer: prompts, accounting, the command line.

A driver runs as `python -m bench.peers.NAME --model PATH --points pp512,tg8 --runs 3`, in its peer's environment, and
prints the same JSON lines as `bench.offline`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from bench.points import Point, parse_points, run_points

TOKEN_IDS = (100, 49_000)
"""Random prompts are drawn from these: ordinary tokens of the default model."""


class Session(Protocol):
    """A loaded engine that runs one batch at a time: `start`, then `step` until enough is there, then `finish`."""

    def start(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> None:
        """Takes in all prompts; each is to yield `output_tokens` tokens, greedily and whatever they are."""

    def step(self) -> Sequence[int]:
        """Runs one step. Returns how many tokens each sequence has yielded since `start`."""

    def finish(self) -> None:
        """Runs or drops what is left, so that `start` may be called again."""


def measure(
    session: Session, point: Point, rng: random.Random, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Tokens a second at one point.

    Prefill is timed from the start until every sequence has its first token; decoding from there until the first
    sequence has its last, so that all of them run throughout.
    """
    prompts = [[rng.randrange(*TOKEN_IDS) for _ in range(point.prompt_tokens)] for _ in range(point.sequences)]
    begin = clock()
    session.start(prompts, max(1, point.output_tokens))
    try:
        while min(counts := session.step()) < 1:
            pass
        first, before = clock(), sum(counts)
        if not point.output_tokens:
            return point.sequences * point.prompt_tokens / (first - begin)
        while max(counts) < point.output_tokens:
            counts = session.step()
        return (sum(counts) - before) / (clock() - first)
    finally:
        session.finish()


def cpus() -> list[int]:
    """The CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def drive(open_meter: Callable[[str, Sequence[Point]], Callable[[Point], float]]) -> None:
    """A driver's command line. `open_meter` gets the model's path and the points, and returns what measures one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a GGUF file, or a Hugging Face folder")
    parser.add_argument("--points", default="pp512,pp8x512,tg1,tg4,tg8,tg16,tg32")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    points = parse_points(arguments.points)
    meter = open_meter(arguments.model, points)
    for row in run_points(meter, points, arguments.runs):
        print(json.dumps(row), flush=True)


def session_meter(session: Session) -> Callable[[Point], float]:
    """What measures one point by `session`."""
    rng = random.Random(0)
    return lambda point: measure(session, point, rng)
