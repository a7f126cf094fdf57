"""Hours at half load: latency and memory at the end must be what they were at the start.

    python -m bench.soak                     # an hour
    python -m bench.soak --minutes 2         # a trial

Starts its own `tandem up`, finds out how many requests a second it takes (a closed loop of `--streams` clients for
`--calibrate` seconds), and then sends half of that, by a Poisson process. Prints JSON lines: the calibration, one for
the first and one for the last tenth of the time, with percentiles of TTFT and ITL in milliseconds and what every
process holds, and the verdict. Exit code 0 when nothing failed and no figure at the end is more than `--slack` above
its start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import psutil
from rich.console import Console
from rich.progress import Progress

from bench.load import Mix, Outcome, Send, latencies, parse_mix, poisson, run_load, sender
from bench.serve import StreamTrace
from bench.stack import Stack
from tandem.client import AsyncClient
from tandem.errors import ConfigError, TandemError

Held = dict[str, dict[str, int]]
"""Process to what it holds."""
GAP_FLOOR_MS = 1.0
"""A latency that grows by less than this is the clock's and the scheduler's doing."""
HELD_FLOORS = {"rss_mib": 16, "fds": 8, "threads": 4}
"""As much may come and go at any time: connections, buffers, threads of pools that are made when first used."""


def held_by(processes: Sequence[psutil.Process]) -> Held:
    """Memory (MiB), descriptors and threads of every process, by its module and place."""
    held = {}
    for place, process in enumerate(processes):
        with process.oneshot():
            name = next((part for part in process.cmdline() if part.endswith(("_service", "gateway", ".cli"))), "other")
            held[f"{place} {name}"] = {
                "rss_mib": process.memory_info().rss >> 20,
                "fds": process.num_fds(),
                "threads": process.num_threads(),
            }
    return held


def tenths(outcomes: Sequence[Outcome], start: float, seconds: float) -> tuple[list[Outcome], list[Outcome]]:
    """The outcomes of requests that came in the first and in the last tenth."""
    first = [outcome for outcome in outcomes if outcome.trace.started - start < seconds / 10]
    last = [outcome for outcome in outcomes if outcome.trace.started - start >= seconds * 9 / 10]
    return first, last


def grown(name: str, before: float, after: float, slack: float, floor: float) -> list[str]:
    """A complaint when `after` is more than `slack` (a share) and more than `floor` above `before`."""
    if after <= before * (1 + slack) or after <= before + floor:
        return []
    return [f"{name} grew from {before:g} to {after:g}"]


def complaints(first: Mapping[str, object], last: Mapping[str, object], slack: float) -> list[str]:
    """What is worse in the last tenth than in the first: nothing is good."""
    found: list[str] = []
    for kind in ("ttft_ms", "itl_ms"):
        for rank in ("p50", "p99"):
            before, after = first[kind][rank], last[kind][rank]  # type: ignore[index]
            found += grown(f"{kind} {rank}", before, after, slack, GAP_FLOOR_MS)
    befores, afters = first["held"], last["held"]
    assert isinstance(befores, dict)
    assert isinstance(afters, dict)
    if befores.keys() != afters.keys():
        found.append(f"other processes run: {', '.join(afters)} in place of {', '.join(befores)}")
    for process in befores.keys() & afters.keys():
        for what, floor in HELD_FLOORS.items():
            found += grown(f"{what} of {process}", befores[process][what], afters[process][what], slack, floor)
    return found


async def calibrate(send: Send, mix: Mix, streams: int, seconds: float, seed: int) -> float:
    """Requests a second of a closed loop of `streams` clients."""
    arrivals = iter(poisson(mix, 1000.0, max(1.0, seconds), seed))
    start, done = time.perf_counter(), 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < start + seconds and (arrival := next(arrivals, None)) is not None:
            await send(arrival, StreamTrace())
            done += 1

    await asyncio.gather(*(client() for _ in range(streams)))
    return done / (time.perf_counter() - start)


async def soak(
    send: Send, held: Callable[[], Held], arguments: argparse.Namespace, tell: Callable[[Mapping[str, object]], None]
) -> list[str]:
    """Calibrates, runs, tells; what is wrong at the end. `held` is asked after the first tenth and near the end."""
    capacity = await calibrate(send, arguments.mix, arguments.streams, arguments.calibrate, arguments.seed)
    seconds, rate = arguments.minutes * 60, capacity / 2
    tell({"phase": "calibration", "requests_per_s": round(capacity, 3), "half": round(rate, 3)})
    if not rate:
        raise ConfigError("--calibrate: no request was through in that time; give it longer")
    arrivals = poisson(arguments.mix, rate, seconds, arguments.seed)
    taken: list[Held] = []
    start = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("soak", total=len(arrivals))

        def done(_: Outcome) -> None:
            progress.advance(task)
            # Both under load: what requests in flight hold must not hide a leak of that size.
            due = (0.1, 0.95)
            if len(taken) < len(due) and time.perf_counter() - start >= seconds * due[len(taken)]:
                taken.append(held())

        outcomes = await run_load(arrivals, send, done)
    early, late = taken[0] if taken else held(), taken[-1] if len(taken) > 1 else held()
    first, last = tenths(outcomes, start, seconds)
    rows = [
        {"phase": phase, "requests": len(part), **latencies(part), "held": holds}
        for phase, part, holds in (("first tenth", first, early), ("last tenth", last, late))
    ]
    for row in rows:
        tell(row)
    failed = [outcome for outcome in outcomes if not outcome.complete]
    found = complaints(rows[0], rows[1], arguments.slack)
    if failed:
        found.insert(
            0, f"{len(failed)} of {len(outcomes)} requests failed, the first with {failed[0].error or 'too few'}"
        )
    if not first or not last:
        found.append("too few requests to compare: give it more --minutes")
    return found


async def _run(stack: Stack, arguments: argparse.Namespace) -> list[str]:
    async with AsyncClient(stack.gateway) as client:
        send = sender(client, (await client.models())[0].vocab_size)
        return await soak(send, lambda: held_by(stack.processes()), arguments, _print)


def _print(row: Mapping[str, object]) -> None:
    print(json.dumps(row), flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--mix", default="128:32+512:32", help="PROMPT:OUTPUT in tokens, several joined by +")
    parser.add_argument("--streams", type=int, default=8, help="clients while the load is calibrated")
    parser.add_argument("--calibrate", type=float, default=20.0, help="seconds of that")
    parser.add_argument("--slack", type=float, default=0.1, help="by what share the end may be worse than the start")
    parser.add_argument("--threads", type=int, help="compute threads a worker")
    parser.add_argument(
        "--kv-memory",
        default=str(256 << 20),
        help="bytes of a worker's KV cache: few, so that the first tenth of the time has touched them all",
    )
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    """Command line; the exit code."""
    arguments = _parse_arguments()
    arguments.mix = parse_mix(arguments.mix)
    for name in ("minutes", "streams", "calibrate", "slack"):
        if getattr(arguments, name) <= 0:
            raise ConfigError(f"--{name}: must be above 0")
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    with Stack(["--model", arguments.model, "--kv-memory", arguments.kv_memory, *threads]) as stack:
        found = asyncio.run(_run(stack, arguments))
    _print({"phase": "verdict", "passed": not found, "complaints": found})
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TandemError as error:
        sys.exit(f"error: {error}")
