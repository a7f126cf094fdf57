"""The page of `bench.growth`: what was measured where, two tables and two charts that GitHub draws by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.floors import Rates

Row = Mapping[str, object]

TITLES = {
    "batch": ("With the batch", "sequences", "Sequences of {context} tokens, more and more of them."),
    "context": ("With the context", "context", "{sequences} sequences of longer and longer contexts."),
}
"""Series to its heading, the key that grows, and what the rest is."""
COLUMNS = {
    "step_ms": "step, ms",
    "min_ms": "fastest",
    "floor_ms": "floor",
    "floor_memory_ms": "by memory",
    "floor_products_ms": "by products",
    "times_floor": "step / floor",
    "tokens_per_s": "tokens/s",
}
EXPLANATION = """\
One decode step of the engine alone: the median of {steps} steps and the fastest of them, in milliseconds. The floor is
the larger of two times: reading the weights once and the keys and values of every sequence, and two operations for each
parameter of the products and sequence, with attention's. It adds nothing up: at best both overlap in full. The rates
are of this very run:

- memory: **{read:.1f} GB/s**, the best of summing a tensor of 1 GiB with all threads;
- products: **{products:.0f} GOP/s**, the best that our own int8 product reaches with a weight that the caches hold. The
  chip's peak is higher, so a step at this floor could still be made faster by a better product.

What a step takes beyond its floor goes to norms, rotation, softmax, the threads' barriers, products that wait for
weights and the host.

The same point in both tables, where there is one, shows how far the machine drifted meanwhile."""
NOTE = "The upper line is the measured step, the lower one its floor. Points stand side by side, not to scale."


def page(facts: Mapping[str, str], rates: Rates, rows: Sequence[Row], steps: int) -> str:
    """The whole page as markdown. A series without rows is left out."""
    text = EXPLANATION.format(steps=steps, read=rates.read_gb_per_s, products=rates.product_gop_per_s)
    lines = ["# How a decode step grows", ""]
    lines += [f"- {label}: {fact}" for label, fact in facts.items()]
    lines += ["", text]
    for grows in TITLES:
        if series := [row for row in rows if row["grows"] == grows]:
            lines += ["", *_section(grows, series)]
    return "\n".join([*lines, ""])


def write_page(path: Path, facts: Mapping[str, str], rates: Rates, rows: Sequence[Row], steps: int) -> None:
    """Writes `page` to `path`, with its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(facts, rates, rows, steps))


def _section(grows: str, series: Sequence[Row]) -> list[str]:
    heading, key, rest = TITLES[grows]
    lines = [f"## {heading}", "", rest.format(**series[0]), ""]
    lines += [_cells([key, *COLUMNS.values()]), _cells(["---:"] * (1 + len(COLUMNS)))]
    lines += [_cells([str(row[name]) for name in (key, *COLUMNS)]) for row in series]
    return [*lines, "", *_chart(key, series), "", NOTE]


def _chart(key: str, series: Sequence[Row]) -> list[str]:
    """Categories and not a numeric axis: mermaid spreads a line's points evenly, which a scale would belie."""
    steps, floors = ([float(str(row[name])) for row in series] for name in ("step_ms", "floor_ms"))
    names = ", ".join(f'"{row[key]}"' for row in series)
    return [
        "```mermaid",
        "xychart-beta",
        '    title "One decode step: measured and floor"',
        f'    x-axis "{key}" [{names}]',
        f'    y-axis "milliseconds" 0 --> {math.ceil(max(steps + floors))}',
        f"    line {_numbers(steps)}",
        f"    line {_numbers(floors)}",
        "```",
    ]


def _numbers(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.2f}' for value in values)}]"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
