"""The page of `bench.goodput`: a table and a chart for each mix, which GitHub draws by itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

COLUMNS = ("rate", "way", "goodput", "good", "TTFT p50", "p99", "ITL p50", "p99", "largest gap")
EXPLANATION = """\
Goodput is requests a second of which every token came, the first within {ttft:g} s and the rest at {itl:g} s a token on
average. Prefill and decode apart are one worker each with half of the {threads} threads; aggregated is one decode
worker with all of them (`tandem up --prefill 0`). Both saw the same requests, which arrived by a Poisson process for
{seconds:g} s. Times are in milliseconds; the largest gap is the longest that any stream stood still between two
tokens."""
NOTE = "The first line is disaggregated, the second aggregated. Rates stand side by side, not to scale."


def page(facts: Row, rows: Sequence[Row]) -> str:
    """The whole page as markdown; `rows` sorted by mix, then rate."""
    shown = {key: facts[key] for key in ("date", "machine", "load", "version")}
    lines = ["# Goodput: disaggregated and aggregated on the same cores", ""]
    lines += [f"- {label}: {fact}" for label, fact in shown.items()]
    limits = facts["limits"]
    lines += ["", EXPLANATION.format(**limits, threads=facts["threads"], seconds=facts["seconds"])]
    lines += ["", _verdict(rows)]
    for mix, group in itertools.groupby(rows, key=lambda row: str(row["mix"])):
        lines += ["", *_section(mix, list(group))]
    return "\n".join([*lines, ""])


def write_page(path: Path, facts: Row, rows: Sequence[Row]) -> None:
    """Writes `page` to `path`, with its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(facts, rows))


def _verdict(rows: Sequence[Row]) -> str:
    """Which way did better how often."""
    pairs: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        pairs.setdefault((str(row["mix"]), float(row["rate"])), {})[str(row["way"])] = float(row["goodput"])
    whole = [(pair["disaggregated"], pair["aggregated"]) for pair in pairs.values() if len(pair) == 2]
    more, fewer = sum(a > b for a, b in whole), sum(a < b for a, b in whole)
    verdict = f"Of {len(whole)} loads, disaggregated has the higher goodput in {more}, aggregated in {fewer}."
    least = min((int(row["requests"]) for row in rows), default=0)
    return f"{verdict} The smallest load is {least} requests: where few came, a difference of one or two is chance."


def _section(mix: str, rows: Sequence[Row]) -> list[str]:
    shapes = " or ".join(f"{p} tokens in, {o} out" for p, o in (part.split(":") for part in mix.split("+")))
    lines = [f"## {mix}", "", f"{shapes}.".capitalize(), "", _cells(COLUMNS), _cells(["---:"] * len(COLUMNS))]
    for row in rows:
        ttft, itl = row["ttft_ms"], row["itl_ms"]
        cells = [row["rate"], row["way"], row["goodput"], f"{row['good']} of {row['requests']}"]
        cells += [ttft["p50"], ttft["p99"], itl["p50"], itl["p99"], row["largest_gap_ms"]]
        lines.append(_cells(cells))
    return [*lines, *_chart(rows)]


def _chart(rows: Sequence[Row]) -> list[str]:
    """Only of rates that both ways have."""
    by_way = {
        way: {row["rate"]: row["goodput"] for row in rows if row["way"] == way}
        for way in ("disaggregated", "aggregated")
    }
    rates = [rate for rate in by_way["disaggregated"] if rate in by_way["aggregated"]]
    if len(rates) < 2:
        return []
    top = math.ceil(max([0.1, *(goods[rate] for goods in by_way.values() for rate in rates)]) * 10) / 10
    names = ", ".join(f'"{rate:g}"' for rate in rates)
    lines = ["", "```mermaid", "xychart-beta", '    title "Goodput, requests a second"']
    lines += [f'    x-axis "arrivals a second" [{names}]', f'    y-axis "good a second" 0 --> {top:g}']
    lines += [f"    line [{', '.join(f'{goods[rate]:.3f}' for rate in rates)}]" for goods in by_way.values()]
    return [*lines, "```", "", NOTE]


def _cells(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
