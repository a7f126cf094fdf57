"""Open-loop load: requests that arrive when they arrive, whether earlier ones are answered or not."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from bench.report import percentiles
from bench.serve import StreamTrace, trace_stream
from tandem.client import AsyncClient
from tandem.errors import ConfigError, TandemError


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens in and out of one request."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests ask for: each draws one of `shapes`."""

    name: str
    shapes: tuple[Shape, ...]


def parse_mix(text: str) -> Mix:
    """`512:32`, or several joined by `+`, each as likely. Raises ConfigError for anything else."""
    shapes = []
    for part in text.split("+"):
        prompt, colon, output = part.strip().partition(":")
        if not colon or not (prompt.isdecimal() and output.isdecimal() and int(prompt) and int(output)):
            raise ConfigError(f"--mixes: {part!r} is not PROMPT:OUTPUT in tokens, such as 512:32")
        shapes.append(Shape(int(prompt), int(output)))
    return Mix(text.strip(), tuple(shapes))


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come: `at` seconds after the start."""

    at: float
    shape: Shape
    seed: int


def poisson(mix: Mix, rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Arrivals of a Poisson process of `rate` a second; the same for the same seed."""
    draw = random.Random(f"{mix.name} {rate} {seed}")
    arrivals, at = [], draw.expovariate(rate)
    while at < seconds:
        arrivals.append(Arrival(at, draw.choice(mix.shapes), draw.randrange(2**32)))
        at += draw.expovariate(rate)
    return arrivals


@dataclass(slots=True)
class Outcome:
    """How one request went. `trace.started` is when it should have been sent, so a late client counts too."""

    shape: Shape
    trace: StreamTrace = field(default_factory=StreamTrace)
    error: str = ""

    @property
    def complete(self) -> bool:
        """True when every token came."""
        return not self.error and sum(count for _, count in self.trace.arrivals) == self.shape.output_tokens

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.trace.first - self.trace.started

    @property
    def itl(self) -> float:
        """Mean seconds a token after the first, as limits on a stream are usually given."""
        after = sum(count for _, count in self.trace.arrivals[1:])
        return (self.trace.last - self.trace.first) / after if after else 0.0


Send = Callable[[Arrival, StreamTrace], Awaitable[None]]
"""Runs one request and notes its tokens' arrivals."""


def sender(client: AsyncClient, vocabulary: int) -> Send:
    """Greedy requests of random token ids over one client."""

    async def send(arrival: Arrival, trace: StreamTrace) -> None:
        draw = random.Random(arrival.seed)
        prompt = [draw.randrange(vocabulary) for _ in range(arrival.shape.prompt_tokens)]
        trace.arrivals = (await trace_stream(client, prompt, arrival.shape.output_tokens)).arrivals

    return send


async def run_load(arrivals: Sequence[Arrival], send: Send, done: Callable[[Outcome], None]) -> list[Outcome]:
    """Sends each at its time; waits for all. `done` is told of each end."""
    start = time.perf_counter()

    async def one(arrival: Arrival) -> Outcome:
        """Waits for an arrival's time and sends it, whatever the others do."""
        await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        outcome = Outcome(arrival.shape, StreamTrace(start + arrival.at))
        try:
            await send(arrival, outcome.trace)
        except TandemError as error:
            outcome.error = type(error).__name__
        done(outcome)
        return outcome

    return list(await asyncio.gather(*(one(arrival) for arrival in arrivals)))


def good(outcome: Outcome, ttft: float, itl: float) -> bool:
    """Complete, and within both limits (seconds)."""
    return outcome.complete and outcome.ttft <= ttft and outcome.itl <= itl


def latencies(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Percentiles in milliseconds over the complete requests; ITL over single gaps between messages."""
    whole = [outcome for outcome in outcomes if outcome.complete]
    return {
        "ttft_ms": percentiles([outcome.ttft for outcome in whole]),
        "itl_ms": percentiles([gap for outcome in whole for gap in outcome.trace.gaps()]),
    }
