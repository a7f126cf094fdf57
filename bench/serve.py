"""The same points through the services: gateway, prefill and decode as processes, gRPC clients.

    tandem up --gateway 127.0.0.1:50051 --no-prefix-cache &
    python -m bench.serve --gateway 127.0.0.1:50051 --points pp512,tg1,tg8,tg32 --json
    python -m bench.serve --gateway 127.0.0.1:50051 --points tg8,tg16,tg32 --runs 7 --beside-engine

tgB counts tokens from the moment the last stream got its first token until the first stream ends, so all B run
throughout; `whole_tokens_per_s` counts from the first request to the last token. TTFT (time to first token) and ITL
(inter-token latency) are in milliseconds, over all streams of all counted runs. With `--beside-engine` each run is
followed by one of the engine alone (default model, default settings), and `of_engine` is the median of the runs'
ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from bench.engine_alone import EngineAlone
from bench.points import Point, parse_points
from bench.report import emit, percentiles
from tandem.client import AsyncClient
from tandem.client.types import Options
from tandem.service import server

Alone = Callable[[Point], Awaitable[float]]
"""Measures the engine alone at a point: tokens a second."""


@dataclass(slots=True)
class StreamTrace:
    """When one stream's tokens arrived; seconds of the monotonic clock."""

    started: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(time, tokens in that message)"""

    @property
    def first(self) -> float:
        """Arrival of the first token."""
        return self.arrivals[0][0]

    @property
    def last(self) -> float:
        """Arrival of the last token."""
        return self.arrivals[-1][0]

    def gaps(self) -> list[float]:
        """Seconds between consecutive messages."""
        times = [time_ for time_, _ in self.arrivals]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


async def trace_stream(client: AsyncClient, prompt: Sequence[int], max_tokens: int) -> StreamTrace:
    """Runs one greedy request that ignores end-of-sequence.

    Without drafts: what follows random prompts repeats itself so much that they would be measured in place of steps.
    """
    trace = StreamTrace(started=time.perf_counter())
    options: Options = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, "speculation": "off"}
    async for event in client.stream(token_ids=list(prompt), **options):
        if tokens := getattr(event, "token_ids", None):
            trace.arrivals.append((time.perf_counter(), len(tokens)))
    return trace


async def measure(
    client: AsyncClient, point: Point, vocabulary: int, rng: random.Random
) -> tuple[float, list[StreamTrace]]:
    """Runs one point once; returns its tokens a second and the traces."""
    prompts = [[rng.randrange(vocabulary) for _ in range(point.prompt_tokens)] for _ in range(point.sequences)]
    begin = time.perf_counter()
    traces = await asyncio.gather(*(trace_stream(client, prompt, max(1, point.output_tokens)) for prompt in prompts))
    if not point.output_tokens:
        return point.sequences * point.prompt_tokens / (max(trace.last for trace in traces) - begin), traces
    return steady_rate(traces), traces


def steady_rate(traces: Sequence[StreamTrace]) -> float:
    """Tokens a second while all streams run: from the last first token to the first finish."""
    start = max(trace.first for trace in traces)
    end = min(trace.last for trace in traces)
    if end <= start:
        return 0.0
    return sum(count for trace in traces for at, count in trace.arrivals if start < at <= end) / (end - start)


def whole_rate(traces: Sequence[StreamTrace]) -> float:
    """Tokens a second from the first request to the last token."""
    tokens = sum(count for trace in traces for _, count in trace.arrivals)
    return tokens / (max(trace.last for trace in traces) - min(trace.started for trace in traces))


async def bench_point(
    client: AsyncClient, point: Point, vocabulary: int, runs: int, seed: int, alone: Alone | None = None
) -> dict[str, object]:
    """One row: medians over `runs` runs after one uncounted."""
    rng = random.Random(seed)
    rates: list[float] = []
    beside: list[float] = []
    wholes: list[float] = []
    traces: list[StreamTrace] = []
    for run in range(runs + 1):
        rate, run_traces = await measure(client, point, vocabulary, rng)
        engine = await alone(point) if alone is not None else 0.0
        if run:
            rates.append(rate)
            beside.append(engine)
            wholes.append(whole_rate(run_traces))
            traces.extend(run_traces)
    row = {
        "point": point.name,
        "clients": point.sequences,
        "tokens_per_s": round(statistics.median(rates), 2),
        "whole_tokens_per_s": round(statistics.median(wholes), 2),
        "ttft_ms": percentiles([trace.first - trace.started for trace in traces]),
        "itl_ms": percentiles([gap for trace in traces for gap in trace.gaps()]),
        "runs": runs,
    }
    return row if alone is None else row | compared(rates, beside)


def compared(rates: Sequence[float], beside: Sequence[float]) -> dict[str, object]:
    """How the services' rates relate to the engine's, each taken right after its rate."""
    ratios = [rate / engine for rate, engine in zip(rates, beside, strict=True)]
    return {
        "engine_tokens_per_s": round(statistics.median(beside), 2),
        "of_engine": round(statistics.median(ratios), 3),
        "of_engine_runs": [round(ratio, 3) for ratio in ratios],
    }


async def run(arguments: argparse.Namespace) -> int:
    """Measures all points over one client."""
    points = parse_points(arguments.points)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncClient(arguments.gateway))
        alone = (await stack.enter_async_context(EngineAlone(points))).measure if arguments.beside_engine else None
        model = (await client.models())[0]
        for seed, point in enumerate(points):
            row = await bench_point(client, point, model.vocab_size, arguments.runs, seed, alone)
            emit([row], as_json=arguments.json)
    return 0


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__.split("\n")[0])
    parser.add_argument("--gateway", default="127.0.0.1:50051", help="HOST:PORT")
    parser.add_argument("--points", default="pp512,pp8x512,tg1,tg4,tg8,tg16,tg32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--beside-engine", action="store_true", help="take turns with the engine alone")
    parser.add_argument("--json", action="store_true", help="one JSON object a line (the default prints a table)")
    arguments = parser.parse_args()
    return server.run(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
