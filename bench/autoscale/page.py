"""The page of `bench.autoscale`: a table of the ways to size the pools, and both pools over time."""

from __future__ import annotations

import itertools
import math
import shlex
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.autoscale.cluster import Look, Result
from bench.autoscale.machines import Machine
from bench.autoscale.rules import ROLES, Pace, Rule

Row = Mapping[str, object]
POINTS = 48
COLUMNS = {
    "way": "pools",
    "workers": "prefill + decode, mean",
    "good": "good",
    "ttft_p95": "TTFT p95, s",
    "ttft_max": "max",
    "itl_p95": "ITL p95, ms",
    "preempted": "preempted",
    "moved": "moved",
    "failed": "unfinished",
}

EXPLANATION = """\
A queueing model of a gateway and both pools, not a measurement: it says what the rules do, not how fast a machine is. A
prefill worker computes {machine.prefill_rate:g} prompt tokens a second; a decode step takes {step_ms:g} ms and
{more_ms:g} ms more for each sequence; a decode worker holds {machine.kv_tokens} tokens and at most
{machine.most_sequences} sequences. A worker serves {machine.start:g} s after it was ordered and drains for at most
{machine.drain:g} s.

The queries are the chart's own, evaluated every 15 s as Prometheus would. The pools follow as a HorizontalPodAutoscaler
does: one worker up in {pace.up:g} s, one down in {pace.down:g} s, and the largest wish of {pace.window:g} s before a
pool shrinks. Good: the first token within {ttft:g} s and the others at {itl_ms:g} ms each on average."""


@dataclass(frozen=True)
class Limits:
    """Seconds: what the chart's rules aim at."""

    ttft: float
    itl: float


def row_of(way: str, result: Result, hours: float, limits: Limits) -> Row:
    """One way to size the pools; all keys are there for each."""
    done = [request for request in result.requests if request.done >= 0]
    first = [request.first - request.arrival.at for request in done]
    gaps = [(r.done - r.first) / max(1, r.arrival.output_tokens - 1) for r in done]
    good = sum(t <= limits.ttft and g <= limits.itl for t, g in zip(first, gaps, strict=True))
    return {
        "way": way,
        "workers": " + ".join(f"{result.worker_hours[role] / hours:.1f}" for role in ROLES),
        "good": f"{100 * good / len(result.requests):.1f} %",
        "ttft_p95": round(quantile(first, 0.95), 2),
        "ttft_max": round(max(first, default=math.nan), 1),
        "itl_p95": round(quantile(gaps, 0.95) * 1000, 1),
        "preempted": result.preemptions,
        "moved": result.migrations,
        "failed": result.unfinished,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """NaN of nothing."""
    if len(values) < 2:
        return values[0] if values else math.nan
    return statistics.quantiles(values, n=100)[round(share * 100) - 1]


@dataclass(frozen=True)
class Story:
    """All that the page tells."""

    facts: Mapping[str, str]
    rows: Sequence[Row]
    result: Result
    """Of the pools that scale."""
    rules: Mapping[str, Sequence[Rule]]
    pace: Pace
    machine: Machine
    limits: Limits


def page(story: Story) -> str:
    """The whole page as markdown."""
    looks = thinned(story.result.looks)
    lines = ["# How the pools scale", "", *(f"- {label}: {fact}" for label, fact in story.facts.items()), ""]
    lines += [_explained(story), "", *_table(story.rows), "", *_rules(story.rules), ""]
    lines += _chart("Requests a second", "requests", looks, [_rates(looks)])
    for role in ROLES:
        lines += ["", f"## {role.capitalize()}", ""]
        lines += _chart(
            f"{role.capitalize()} workers: ordered and ready",
            "workers",
            looks,
            [[float(look.ordered[role]) for look in looks], [float(look.ready[role]) for look in looks]],
        )
        lines += ["", "Where the lines differ, the upper one is what was ordered, and the lower one is ready."]
        for rule in story.rules[role]:
            values = [look.values.get(rule.name, 0.0) for look in looks]
            lines += ["", *_chart(f"{rule.name} (target {rule.target:g})", rule.name, looks, [values])]
    return "\n".join([*lines, ""])


def _explained(story: Story) -> str:
    machine, pace, limits = story.machine, story.pace, story.limits
    text = EXPLANATION.format(
        machine=machine,
        pace=pace,
        step_ms=machine.step_base * 1000,
        more_ms=machine.step_per_sequence * 1000,
        ttft=limits.ttft,
        itl_ms=limits.itl * 1000,
    )
    return "\n\n".join(textwrap.fill(part, 118) for part in text.split("\n\n"))


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [_cells(list(COLUMNS.values())), _cells(["---"] + ["---:"] * (len(COLUMNS) - 1))]
    return lines + [_cells([str(row[name]) for name in COLUMNS]) for row in rows]


def _rules(rules: Mapping[str, Sequence[Rule]]) -> list[str]:
    lines = [_cells(["role", "rule", "target", "kind"]), _cells(["---"] * 4)]
    return lines + [_cells([role, rule.name, f"{rule.target:g}", rule.kind]) for role in ROLES for rule in rules[role]]


def thinned(looks: Sequence[Look], points: int = POINTS) -> list[Look]:
    """At most `points` looks, evenly spread; arrivals are summed up."""
    step = max(1, math.ceil(len(looks) / points))
    groups = [looks[at : at + step] for at in range(0, len(looks), step)]
    return [
        Look(
            at=group[0].at,
            arrivals=sum(look.arrivals for look in group),
            waiting=max(look.waiting for look in group),
            ready=group[-1].ready,
            ordered=group[-1].ordered,
            values={name: max(look.values[name] for look in group) for name in group[0].values},
        )
        for group in groups
    ]


def _rates(looks: Sequence[Look]) -> list[float]:
    spans = [after.at - look.at for look, after in itertools.pairwise(looks)]
    spans.append(spans[-1] if spans else 1.0)
    return [look.arrivals / span for look, span in zip(looks, spans, strict=True)]


def _chart(title: str, unit: str, looks: Sequence[Look], series: Sequence[Sequence[float]]) -> list[str]:
    """The points are evenly spread, as mermaid draws them on a numeric axis."""
    top = max((value for line in series for value in line), default=0.0)
    lines = [f"    line [{', '.join(f'{value:.2f}' for value in line)}]" for line in series]
    return [
        "```mermaid",
        "xychart-beta",
        f'    title "{title}"',
        f'    x-axis "hours" 0 --> {looks[-1].at / 3600:.1f}',
        f'    y-axis "{unit}" 0 --> {math.ceil(top * 1.1) if top > 1 else max(0.1, round(top * 1.1, 2))}',
        *lines,
        "```",
    ]


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_page(path: Path, story: Story) -> None:
    """Writes `page` to `path`, with its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(story))


def command_of(arguments: Sequence[str]) -> str:
    """As one would type it."""
    return f"`{shlex.join(['python', '-m', 'bench.autoscale', *arguments])}`"
