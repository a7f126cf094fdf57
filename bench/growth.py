"""How the time of one decode step grows with the batch and with the context, beside its floor: the engine alone.

    python -m bench.growth                                  # two tables, a few minutes
    python -m bench.growth --json --markdown docs/growth.md

First sequences of 128 tokens, more and more of them; then eight sequences of longer and longer contexts. At each point
prompts of random token ids are prefilled, two steps are not counted, and then 24 decode steps are timed one by one.
The floor is what the step must read and multiply at the rates that two probes reach in the same run (`bench.floors`).
Compute is int8; the weights and the KV cache are those of `tandem up`.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.floors import Rates, StepWork, measure_rates, step_work
from bench.growth_page import write_page
from bench.peers.machine import describe_machine, load_average, source_version
from bench.report import emit
from bench.sequences import Advance, SequenceDriver, blocks_of, load_bench_engine
from engine.loading import Engine
from engine.models.fused import FusedModel
from tandem.errors import ConfigError, TandemError
from tandem.models import resolve_model

BATCHES = "1,2,4,8,12,16,24,32,48,64"
CONTEXTS = "128,256,512,1000,2000,4000,8000"
BATCH_CONTEXT = 128
CONTEXT_BATCH = 8
UNCOUNTED_STEPS = 2
CHUNK_SIZE = 512

KEYS = {"batch": "sequences", "context": "context"}
"""What grows in each series."""
SHORT_NAMES = {
    "step_ms": "step ms",
    "min_ms": "fastest",
    "floor_ms": "floor",
    "times_floor": "/ floor",
    "tokens_per_s": "tokens/s",
}
"""Columns of the printed tables."""

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Place:
    """A point of one of the two series: `grows` is "batch" or "context"."""

    grows: str
    sequences: int
    context_tokens: int


def parse_numbers(flag: str, text: str) -> list[int]:
    """A comma-separated list of whole numbers from 1 up. Raises ConfigError with the flag's name."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isascii() or not part.isdigit() or int(part) < 1:
            raise ConfigError(f"{flag}: {part!r} is not a whole number from 1 up")
    return [int(part) for part in parts]


def places(batches: Sequence[int], contexts: Sequence[int]) -> list[Place]:
    """Both series, the batch's first. Raises ConfigError when there is no point at all."""
    if not batches and not contexts:
        raise ConfigError("nothing to measure: give --batches, --contexts or both")
    by_batch = [Place("batch", batch, BATCH_CONTEXT) for batch in batches]
    return by_batch + [Place("context", CONTEXT_BATCH, context) for context in contexts]


def step_times(driver: SequenceDriver, place: Place, steps: int, advance: Advance | None = None) -> list[float]:
    """Milliseconds of each of `steps` decode steps, once the prompts and two more steps are done."""
    with driver.sequences(place.sequences, place.context_tokens) as sequences:
        driver.prefill(sequences, advance)
        times = []
        for _ in range(UNCOUNTED_STEPS + steps):
            start = time.perf_counter()
            driver.decode(sequences)
            times.append((time.perf_counter() - start) * 1000)
        return times[UNCOUNTED_STEPS:]


def growth_row(place: Place, times: Sequence[float], work: StepWork, rates: Rates) -> Row:
    """One line of the result; all keys are there for every point."""
    median, floor = statistics.median(times), work.floor_ms(rates)
    return {
        "grows": place.grows,
        "sequences": place.sequences,
        "context": place.context_tokens,
        "step_ms": round(median, 2),
        "min_ms": round(min(times), 2),
        "floor_ms": round(floor, 2),
        "floor_memory_ms": round(work.memory_ms(rates), 2),
        "floor_products_ms": round(work.products_ms(rates), 2),
        "times_floor": round(median / floor, 2),
        "tokens_per_s": round(place.sequences * 1000 / median, 1),
    }


def measure(driver: SequenceDriver, points: Sequence[Place], steps: int, rates: Rates) -> Iterator[Row]:
    """A row for each point as it comes; progress goes to stderr."""
    engine = driver.engine
    model = engine.runner.model
    assert isinstance(model, FusedModel), "compute is int8"
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(place.sequences * place.context_tokens for place in points))
        for place in points:
            progress.update(task, description=f"{place.sequences} x {place.context_tokens} tokens")
            times = step_times(driver, place, steps, lambda tokens: progress.advance(task, tokens))
            sizes = (place.sequences, place.context_tokens)
            work = step_work(engine.model_config, engine.engine_config, model.step_nbytes, *sizes)
            yield growth_row(place, times, work, rates)


def load_driver(model: str, points: Sequence[Place], steps: int, threads: int | None) -> SequenceDriver:
    """An engine with room for every point. Raises ConfigError when a context is longer than the model's."""
    more = UNCOUNTED_STEPS + steps
    blocks = max(blocks_of(place.sequences, place.context_tokens + more) for place in points)
    engine = load_bench_engine(model, {"compute": "int8", "threads": threads}, CHUNK_SIZE, blocks)
    _refuse_too_long(engine, max(place.context_tokens for place in points), more)
    return SequenceDriver(engine, CHUNK_SIZE)


def _refuse_too_long(engine: Engine, context: int, more: int) -> None:
    limit = engine.engine_config.context_limit(engine.model_config)
    if context + more > limit:
        raise ConfigError(f"--contexts: {context} tokens and {more} steps are more than the model's {limit} tokens")


def report(rows: Iterable[Row], rates: Rates, *, as_json: bool) -> list[Row]:
    """Prints the rates, then the rows: as each comes, or a table a series. Returns all rows."""
    emit([{key: round(value, 1) for key, value in asdict(rates).items()}], as_json=as_json)
    done: list[Row] = []
    if as_json:
        for row in rows:
            emit([row], as_json=True)
            done.append(row)
        return done
    done.extend(rows)
    for grows, key in KEYS.items():
        # Few columns with short names: a table is cut off at 80 characters where there is no terminal.
        shown = {key: key, **SHORT_NAMES}
        if series := [row for row in done if row["grows"] == grows]:
            emit([{name: row[long] for long, name in shown.items()} for row in series], as_json=False)
    return done


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default", help="default, or a path to a GGUF file or Hugging Face folder")
    parser.add_argument("--batches", default=BATCHES, help=f"sequences of {BATCH_CONTEXT} tokens; default: {BATCHES}")
    parser.add_argument("--contexts", default=CONTEXTS, help=f"tokens of {CONTEXT_BATCH} sequences; default {CONTEXTS}")
    parser.add_argument("--steps", type=int, default=24, help="timed steps at each point")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--markdown", type=Path, help="also write a page with tables and charts to this file")
    parser.add_argument("--json", action="store_true", help="one JSON object a line (the default prints tables)")
    return parser.parse_args()


def main() -> None:
    """Command line."""
    arguments = _parse_arguments()
    if arguments.steps < 1:
        raise ConfigError("--steps: must be 1 or more")
    numbers = (parse_numbers("--batches", arguments.batches), parse_numbers("--contexts", arguments.contexts))
    points = places(*numbers)
    started, load = datetime.datetime.now(datetime.UTC), load_average()
    driver = load_driver(arguments.model, points, arguments.steps, arguments.threads)
    rates = measure_rates()  # with the engine's threads, which loading has set
    rows = report(measure(driver, points, arguments.steps, rates), rates, as_json=arguments.json)
    if arguments.markdown is not None:
        facts = {
            "date": f"{started:%Y-%m-%d %H:%M} UTC",
            "machine": describe_machine(),
            "load": f"{load:.1f} before, {load_average():.1f} at the end (one-minute averages)",
            "model": f"{resolve_model(arguments.model).name}, compute int8, "
            f"KV in {driver.engine.engine_config.kv_dtype}",
            "version": source_version(),
            "command": f"`{shlex.join(['python', '-m', 'bench.growth', *sys.argv[1:]])}`",
        }
        write_page(arguments.markdown, facts, rates, rows, arguments.steps)


if __name__ == "__main__":
    try:
        main()
    except TandemError as error:
        sys.exit(f"error: {error}")
