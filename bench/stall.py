"""The largest inter-token gap of running streams while a long prompt arrives.

    tandem up --gateway 127.0.0.1:50051 &                                  # prefill and decode apart
    python -m bench.stall --gateway 127.0.0.1:50051 --json

Beside it one process that prefills unchunked: `tandem up --prefill 0` would still chunk beside running streams.

    python -m decode_service --model PATH --listen 127.0.0.1:7001 --chunk-size 8192 --mixed-prefill-tokens 8192 &
    python -m gateway --model PATH --listen 127.0.0.1:50052 --decode-worker 127.0.0.1:7001 &
    python -m bench.stall --gateway 127.0.0.1:50052 --json

Eight streams decode; once all run, a prompt of 4,000 tokens arrives. Prints the largest gap before it came and the
largest gap between its arrival and its first token, in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

from bench.report import emit, percentiles
from bench.serve import StreamTrace, trace_stream
from tandem.client import AsyncClient


async def _watch(client: AsyncClient, prompt: list[int], trace: StreamTrace, running: asyncio.Event) -> None:
    """Streams until cancelled, noting arrivals in `trace`; sets `running` at the fifth."""
    async for event in client.stream(
        token_ids=prompt, max_tokens=4000, temperature=0.0, ignore_eos=True, speculation="off", timeout=600
    ):
        if tokens := getattr(event, "token_ids", None):
            trace.arrivals.append((time.perf_counter(), len(tokens)))
            if len(trace.arrivals) == 5:
                running.set()


def _gaps(traces: list[StreamTrace], begin: float, end: float) -> list[float]:
    """Gaps between messages that end within [begin, end], over all streams."""
    return [
        later - earlier
        for trace in traces
        for (earlier, _), (later, _) in zip(trace.arrivals, trace.arrivals[1:], strict=False)
        if begin <= later <= end
    ]


async def measure(gateway: str, streams: int, prompt_tokens: int, quiet_seconds: float) -> dict[str, object]:
    """One row."""
    rng = random.Random(5)
    traces = [StreamTrace() for _ in range(streams)]
    running = [asyncio.Event() for _ in range(streams)]
    async with AsyncClient(gateway) as client:
        tasks = [
            asyncio.ensure_future(_watch(client, [rng.randrange(17, 40000) for _ in range(32)], trace, event))
            for trace, event in zip(traces, running, strict=True)
        ]
        await asyncio.gather(*(event.wait() for event in running))
        begin = time.perf_counter()
        await asyncio.sleep(quiet_seconds)
        arrival = time.perf_counter()
        long = await trace_stream(client, [rng.randrange(17, 40000) for _ in range(prompt_tokens)], 4)
        end = max(long.last, max(trace.last for trace in traces))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "streams": streams,
        "prompt_tokens": prompt_tokens,
        "quiet_gap_ms": percentiles(_gaps(traces, begin, arrival)),
        "gap_ms": percentiles(_gaps(traces, arrival, end)),
        "ttft_ms": round((long.first - arrival) * 1000, 1),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.stall", description=__doc__.split("\n")[0])
    parser.add_argument("--gateway", default="127.0.0.1:50051", help="HOST:PORT")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--quiet-seconds", type=float, default=3.0)
    parser.add_argument("--json", action="store_true", help="one JSON object (the default prints a table)")
    arguments = parser.parse_args()
    row = asyncio.run(measure(arguments.gateway, arguments.streams, arguments.prompt_tokens, arguments.quiet_seconds))
    emit([row], as_json=arguments.json)


if __name__ == "__main__":
    main()
