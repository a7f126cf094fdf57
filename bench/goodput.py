"""Requests a second within limits on latency: prefill and decode apart against one worker that does both.

    python -m bench.goodput                                             # all mixes, about 20 minutes
    python -m bench.goodput --mixes 512:32 --rates 0.5,1 --seconds 30   # one piece; results merge
    python -m bench.goodput --markdown docs/goodput.md --page-only      # the page of what was measured

Both ways run on the same cores with the same threads in all: `tandem up --threads T/2` (a prefill and a decode worker)
and `tandem up --prefill 0 --threads T`, one after the other for each load, the first of the two in turns. Requests
arrive by a Poisson process, the same for both. A request is good when all its tokens came, the first within `--ttft`
and the rest at `--itl` a token on average; goodput is good requests a second of the time in which requests arrived. The
largest gap is that between two tokens of any stream.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from bench.goodput_page import write_page
from bench.load import Arrival, Mix, Outcome, good, latencies, parse_mix, poisson, run_load, sender
from bench.peers.machine import describe_machine, load_average, source_version
from bench.report import emit
from bench.serve import StreamTrace
from bench.stack import Stack, cores
from tandem.client import AsyncClient
from tandem.errors import ConfigError, TandemError

MIXES = "512:32,128:128,2048:64,128:128+2048:64"
RATES = "0.25,0.5,1,2"
RESULTS = Path("bench/results")
WAYS = ("disaggregated", "aggregated")
ALIKE = ("machine", "threads", "limits", "seconds", "seed", "version")
"""Facts that must be the same in all results on one page."""
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds."""

    ttft: float
    itl: float


def flags_of(way: str, threads: int) -> list[str]:
    """Flags of `tandem up`: `threads` compute threads in all. Raises ConfigError when they can't be halved."""
    if threads < 2 or threads % 2:
        raise ConfigError(f"--threads: {threads} can't be shared by a prefill and a decode worker; give an even number")
    if way == "disaggregated":
        return ["--threads", str(threads // 2), "--no-prefix-cache"]
    return ["--prefill", "0", "--threads", str(threads), "--no-prefix-cache"]


def row_of(way: str, mix: Mix, rate: float, seconds: float, limits: Limits, outcomes: Sequence[Outcome]) -> Row:
    """What one way did under one load."""
    counted = sum(good(outcome, limits.ttft, limits.itl) for outcome in outcomes)
    gaps = [gap for outcome in outcomes for gap in outcome.trace.gaps()]
    return {
        "way": way,
        "mix": mix.name,
        "rate": rate,
        "requests": len(outcomes),
        "failed": sum(not outcome.complete for outcome in outcomes),
        "good": counted,
        "goodput": round(counted / seconds, 3),
        **latencies(outcomes),
        "largest_gap_ms": round(max(gaps, default=0.0) * 1000, 1),
    }


async def measure(
    gateway: str, mix: Mix, arrivals: Sequence[Arrival], told: Callable[[Outcome], None]
) -> list[Outcome]:
    """One load, after one request that is not counted."""
    async with AsyncClient(gateway) as client:
        send = sender(client, (await client.models())[0].vocab_size)
        await send(Arrival(0.0, mix.shapes[0], 0), StreamTrace())
        return await run_load(arrivals, send, told)


def _advance(progress: Progress, task: TaskID, _: Outcome) -> None:
    progress.advance(task)


def in_turns(ways: Sequence[str], number: int) -> list[str]:
    """The ways in the order in which load `number` takes them: each goes first half of the time."""
    first = number % len(ways)
    return [*ways[first:], *ways[:first]]


def run_loads(arguments: argparse.Namespace, progress: Progress) -> Iterator[Row]:
    """Every mix and rate by each way, one after the other, each in a stack of its own."""
    limits = Limits(arguments.ttft, arguments.itl)
    cases = [(mix, rate) for mix in arguments.mixes for rate in arguments.rates]
    for number, (mix, rate) in enumerate(cases):
        arrivals = poisson(mix, rate, arguments.seconds, arguments.seed)
        for way in in_turns(arguments.ways, number):
            task = progress.add_task(f"{mix.name} at {rate:g}, {way}", total=len(arrivals))
            with Stack([*flags_of(way, arguments.threads), "--model", arguments.model]) as stack:
                outcomes = asyncio.run(measure(stack.gateway, mix, arrivals, partial(_advance, progress, task)))
            yield row_of(way, mix, rate, arguments.seconds, limits, outcomes)


def write_result(folder: Path, arguments: argparse.Namespace, rows: Sequence[Row]) -> Path:
    """A file of its own for each run, so that pieces can be put together."""
    now = datetime.datetime.now(datetime.UTC)
    facts = {
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "machine": describe_machine(),
        "load": f"{load_average():.1f} at the end",
        "version": source_version(),
        "threads": arguments.threads,
        "seconds": arguments.seconds,
        "seed": arguments.seed,
        "limits": asdict(Limits(arguments.ttft, arguments.itl)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"goodput-{now:%Y-%m-%d-%H%M%S}.json"
    path.write_text(json.dumps({"facts": facts, "rows": list(rows)}, indent=1) + "\n")
    return path


def merge(results: Sequence[Mapping[str, object]]) -> tuple[Mapping[str, object], list[Row]]:
    """Rows of several runs, the last of each way, mix and rate; facts of the last run.

    Raises ConfigError when they were not measured alike, or when there are none.
    """
    if not results:
        raise ConfigError("no results: run python -m bench.goodput first")
    for key in ALIKE:
        said = {json.dumps(result["facts"].get(key), sort_keys=True) for result in results}  # type: ignore[attr-defined]
        if len(said) > 1:
            what = " or ".join(sorted(said))
            raise ConfigError(f"--results: the files were not measured alike: {key} is {what}; name fewer")
    rows = {(row["way"], row["mix"], row["rate"]): row for result in results for row in result["rows"]}  # type: ignore[attr-defined]
    return results[-1]["facts"], sorted(rows.values(), key=lambda row: (row["mix"], row["rate"], row["way"]))  # type: ignore[return-value]


def parse_rates(text: str) -> list[float]:
    """Requests a second, comma-separated. Raises ConfigError."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1e6 for rate in rates):
        raise ConfigError(f"--rates: {text!r} is no comma-separated list of requests a second above 0")
    return rates


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.goodput", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--mixes", default=MIXES, help=f"PROMPT:OUTPUT, several in one joined by +; default: {MIXES}")
    parser.add_argument("--rates", default=RATES, help=f"requests a second; default: {RATES}")
    parser.add_argument("--ways", default=",".join(WAYS), help="disaggregated, aggregated or both")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long requests arrive at each rate")
    parser.add_argument("--threads", type=int, default=max(2, cores() // 2 * 2), help="compute threads in all")
    parser.add_argument("--ttft", type=float, default=2.0, help="seconds to the first token")
    parser.add_argument("--itl", type=float, default=0.1, help="seconds a token after it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, nargs="*", help="files for the page; default: all of bench/results")
    parser.add_argument("--markdown", type=Path, help="write the page of all results to this file")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object a line (the default prints a table)")
    return parser.parse_args()


def _check(arguments: argparse.Namespace) -> None:
    arguments.mixes = [parse_mix(text) for text in arguments.mixes.split(",")]
    arguments.rates = parse_rates(arguments.rates)
    arguments.ways = arguments.ways.split(",")
    if unknown := set(arguments.ways) - set(WAYS):
        raise ConfigError(f"--ways: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    for name in ("seconds", "ttft", "itl"):
        if getattr(arguments, name) <= 0:
            raise ConfigError(f"--{name}: must be above 0")


def main() -> None:
    """Command line."""
    arguments = _parse_arguments()
    _check(arguments)
    if not arguments.page_only:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            rows = list(run_loads(arguments, progress))
        emit(rows, as_json=arguments.json)
        print(f"written to {write_result(RESULTS, arguments, rows)}", file=sys.stderr)
    if arguments.markdown is not None:
        paths = arguments.results or sorted(RESULTS.glob("goodput-*.json"))
        facts, merged = merge([json.loads(path.read_text()) for path in paths])
        write_page(arguments.markdown, facts, merged)


if __name__ == "__main__":
    try:
        main()
    except TandemError as error:
        sys.exit(f"error: {error}")
