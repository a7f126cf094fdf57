"""Replays a day of requests against the chart's scaling rules and a model of both pools.

    python -m bench.autoscale                                    # a table: pools that scale, and pools of fixed sizes
    python -m bench.autoscale --markdown docs/autoscale.md       # the page with plots of both pools
    python -m bench.autoscale --trace requests.csv --json        # your own arrivals: at,prompt_tokens,output_tokens

The same trace meets pools that scale, pools that always have as many workers as those had on average (the same cost),
and pools that always have as many as those had at most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from bench.autoscale.cluster import Cluster, Result
from bench.autoscale.machines import Machine
from bench.autoscale.page import Limits, Row, Story, command_of, row_of, write_page
from bench.autoscale.rules import CHART, ROLES, load_pace, load_rules
from bench.autoscale.trace import Arrival, Day, read_trace, synthetic
from bench.report import emit
from tandem.errors import ConfigError, TandemError

SHOWN = ("way", "workers", "good", "ttft_p95", "itl_p95", "failed")
"""Columns of the printed table."""


def fixed_ways(result: Result, hours: float) -> dict[str, dict[str, int]]:
    """Pools of fixed sizes to compare with: the same cost, and no shortage."""
    mean = {role: max(1, round(result.worker_hours[role] / hours)) for role in ROLES}
    return {"fixed, as many on average": mean, "fixed, as many as at most": dict(result.most)}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of trace, pools and machine."""
    parser = argparse.ArgumentParser(prog="python -m bench.autoscale", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--trace",
        type=Path,
        help="CSV of arrivals: at (seconds), prompt_tokens, output_tokens; default: a synthetic day",
    )
    add("--seed", type=int, default=1, help="of the synthetic day")
    for item in fields(Day):
        kind = int if item.type == "int" else float
        add(f"--{item.name.replace('_', '-')}", type=kind, default=item.default, help="of the synthetic day")
    for item in fields(Machine):
        kind = int if item.type == "int" else float
        add(f"--machine-{item.name.replace('_', '-')}", type=kind, default=item.default, help="of every worker")
    add("--chart", type=Path, default=CHART, metavar="FOLDER", help="whose rules decide; default: this repository's")
    add("--least", type=int, default=1, help="workers of a pool")
    add("--most", type=int, default=8, help="workers of a pool")
    add("--markdown", type=Path, help="also write a page with plots to this file")
    add("--json", action="store_true", help="one JSON object a line (the default prints a table)")
    return parser.parse_args(argv)


def machine_of(arguments: argparse.Namespace) -> Machine:
    """Raises ConfigError for values that no machine has."""
    machine = Machine(**{item.name: getattr(arguments, f"machine_{item.name}") for item in fields(Machine)})
    if min(machine.prefill_rate, machine.step_base, machine.kv_tokens, machine.most_sequences) <= 0:
        raise ConfigError("--machine-...: rates, times and sizes must be larger than 0")
    return machine


def arrivals_of(arguments: argparse.Namespace) -> list[Arrival]:
    """From the file, or made. Raises ConfigError."""
    if arguments.trace is not None:
        return read_trace(arguments.trace)
    day = Day(**{item.name: getattr(arguments, item.name) for item in fields(Day)})
    if min(day.hours, day.busy, day.prompt_tokens, day.output_tokens) <= 0 or day.busy < day.quiet:
        raise ConfigError(
            "--hours, --busy, --prompt-tokens, --output-tokens: they must be larger than 0, and busy > quiet"
        )
    arrivals = synthetic(day, arguments.seed)
    if not arrivals:
        raise ConfigError("--busy: nothing arrives in so short a day")
    return arrivals


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(argv)
    if not 1 <= arguments.least <= arguments.most:
        raise ConfigError("--least and --most: 1 at least, and no more than the most")
    arrivals, machine = arrivals_of(arguments), machine_of(arguments)
    hours = arrivals[-1].at / 3600
    rules, pace = load_rules(arguments.chart), load_pace(arguments.chart, least=arguments.least, most=arguments.most)
    limits = Limits(*(next(r.target for r in rules[role] if r.kind == "Value") for role in ROLES))
    paces = dict.fromkeys(ROLES, pace)
    result = Cluster(machine, dict.fromkeys(ROLES, arguments.least), rules, paces).run(arrivals)
    rows: list[Row] = [row_of("scaled", result, hours, limits)]
    for way, counts in fixed_ways(result, hours).items():
        rows.append(row_of(way, Cluster(machine, counts).run(arrivals), hours, limits))
    emit(rows if arguments.json else [{name: row[name] for name in SHOWN} for row in rows], as_json=arguments.json)
    if arguments.markdown is not None:
        facts = {
            "requests": f"{len(arrivals)} in {hours:.1f} hours",
            "trace": str(arguments.trace.name) if arguments.trace else f"synthetic, seed {arguments.seed}",
            "command": command_of(sys.argv[1:] if argv is None else argv),
        }
        write_page(arguments.markdown, Story(facts, rows, result, rules, replace(pace), machine, limits))


if __name__ == "__main__":
    try:
        main()
    except TandemError as error:
        sys.exit(f"error: {error}")
