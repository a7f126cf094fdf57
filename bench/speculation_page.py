"""Tables and the chart of `bench.speculation`, as markdown that GitHub draws by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Row = Mapping[str, object]
NOTE = (
    "The upper line at the repetitive tasks is with drafts, the other without. Points stand side by side, not to scale."
)


def table(rows: Sequence[Row]) -> str:
    """All rows; the first column is text."""
    head = list(rows[0])
    lines = [_cells(head), _cells([":---", *["---:"] * (len(head) - 1)])]
    return "\n".join([*lines, *(_cells([str(row[key]) for key in head]) for row in rows)])


def chart(rows: Sequence[Row]) -> str:
    """Tokens a second task by task, with drafts and without."""
    series = {name: [float(str(row[f"{name}, tokens/s"])) for row in rows] for name in ("auto", "off")}
    most = math.ceil(max(value for values in series.values() for value in values) / 10) * 10
    names = ", ".join(f'"{row["task"]}"' for row in rows)
    return "\n".join(
        [
            "```mermaid",
            "xychart-beta",
            '    title "Tokens a second: with drafts and without"',
            f'    x-axis "task" [{names}]',
            f'    y-axis "tokens/s" 0 --> {most}',
            *(f"    line [{', '.join(f'{value:.1f}' for value in values)}]" for values in series.values()),
            "```",
            "",
            NOTE,
        ]
    )


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
