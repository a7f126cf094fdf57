"""What the way over a second process adds to the first and to the second token, through the real services.

    tandem up --gateway 127.0.0.1:50051 --http 127.0.0.1:50061 --no-prefix-cache --local-prefill-threshold 0 &
    tandem up --gateway 127.0.0.1:50052 --http 127.0.0.1:50062 --no-prefix-cache --prefill 0 &
    python -m bench.transfer_ttft --apart 127.0.0.1:50051 --local 127.0.0.1:50052

Each prompt of random tokens goes to prefill and decode apart (`--transport` of its `tandem up` says how the blocks
travel), and to a decode worker that prefills itself, one after the other, the first of the two in turns. `added_ms` is
the median of the differences of the times to first token: chunks travel while the next is computed, and the prefill
worker's first token doesn't wait for the last one to arrive. The second token does: `second_added_ms`, the same for
the time to the second token, holds all that the hand-off costs.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from bench.growth import parse_numbers
from bench.report import emit
from bench.serve import StreamTrace, trace_stream
from tandem.client import AsyncClient
from tandem.errors import TandemError

TOKENS = "16,128,512,1024,2048,4096,8000"
OUTPUT_TOKENS = 3
LEAST_CHUNKS = 4
MOST_ADDED_MS, MOST_ADDED_SHARE = 2.0, 0.05


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt's times in ms: to the first and to the second token, apart and local."""

    first: tuple[float, float]
    second: tuple[float, float]


def pair_of(apart: StreamTrace, local: StreamTrace) -> Pair:
    """From two streams of one prompt."""
    return Pair(
        ((apart.first - apart.started) * 1000, (local.first - local.started) * 1000),
        (_second(apart), _second(local)),
    )


def _second(trace: StreamTrace) -> float:
    """Milliseconds until two tokens had come."""
    count = 0
    for at, tokens in trace.arrivals:
        count += tokens
        if count >= 2:
            return (at - trace.started) * 1000
    raise ValueError("a stream of fewer than two tokens")


def row_of(tokens: int, pairs: Sequence[Pair]) -> dict[str, object]:
    """Medians; differences are taken pair by pair."""
    local = statistics.median(pair.first[1] for pair in pairs)
    added = statistics.median(pair.first[0] - pair.first[1] for pair in pairs)
    return {
        "tokens": tokens,
        "ttft_ms": round(statistics.median(pair.first[0] for pair in pairs), 1),
        "local_ms": round(local, 1),
        "added_ms": round(added, 1),
        "added_percent": round(100 * added / local, 1),
        "second_added_ms": round(statistics.median(pair.second[0] - pair.second[1] for pair in pairs), 1),
        "pairs": len(pairs),
    }


def misses(rows: Sequence[dict[str, object]], chunk: int) -> list[str]:
    """Which prompts of at least four chunks wait more than 2 ms and more than 5 % longer, in words."""
    said = []
    for row in rows:
        added, percent = float(str(row["added_ms"])), float(str(row["added_percent"]))
        long = int(str(row["tokens"])) >= LEAST_CHUNKS * chunk
        if long and added > MOST_ADDED_MS and percent > 100 * MOST_ADDED_SHARE:
            said.append(f"{row['tokens']} tokens: the first token comes {added} ms ({percent} %) later")
    return said


async def measure(apart: AsyncClient, local: AsyncClient, tokens: int, pairs: int) -> list[Pair]:
    """One more pair goes before, not counted."""
    rng = random.Random(tokens)
    made = []
    for number in range(pairs + 1):
        prompt = [rng.randrange(17, 40000) for _ in range(tokens)]
        traces: dict[bool, StreamTrace] = {}
        for is_apart in (True, False) if number % 2 else (False, True):
            traces[is_apart] = await trace_stream(apart if is_apart else local, prompt, OUTPUT_TOKENS)
        made.append(pair_of(traces[True], traces[False]))
    return made[1:]


async def run(arguments: argparse.Namespace) -> int:
    """0, or 1 when a must is missed."""
    rows = []
    async with AsyncClient(arguments.apart) as apart, AsyncClient(arguments.local) as local:
        for tokens in parse_numbers("--tokens", arguments.tokens):
            rows.append(row_of(tokens, await measure(apart, local, tokens, arguments.pairs)))
            if arguments.json:
                emit([rows[-1]], as_json=True)
    if not arguments.json:
        emit(rows, as_json=False)
    missed = misses(rows, arguments.chunk_size)
    print("\n".join(missed) or "every must is met")
    return 1 if missed else 0


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.transfer_ttft", description=__doc__.split("\n")[0])
    parser.add_argument("--apart", required=True, metavar="HOST:PORT", help="gateway of prefill and decode workers")
    parser.add_argument("--local", required=True, metavar="HOST:PORT", help="gateway of decode workers alone")
    parser.add_argument("--tokens", default=TOKENS, help="prompt lengths")
    parser.add_argument("--pairs", type=int, default=5, help="counted pairs of each length")
    parser.add_argument("--chunk-size", type=int, default=512, help="of the prefill worker")
    parser.add_argument("--json", action="store_true", help="one JSON object a line (the default prints a table)")
    arguments = parser.parse_args()
    try:
        return asyncio.run(run(arguments))
    except TandemError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
