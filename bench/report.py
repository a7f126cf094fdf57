"""How benchmarks print: one JSON object a line, or a table for people."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence


def emit(rows: Iterable[Mapping[str, object]], *, as_json: bool) -> None:
    """Prints rows with equal keys: JSON as each comes, a table at the end."""
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)
        return
    from rich.console import Console  # late: machines with a GPU have torch and little else
    from rich.table import Table

    table = Table()
    for row in rows:
        if not table.columns:
            for key in row:
                table.add_column(key, justify="right")
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def percentiles(values: Sequence[float], scale: float = 1000.0) -> dict[str, float]:
    """p50, p90, p99 and max of `values`, times `scale` (seconds to milliseconds), rounded. Empty input gives zeros."""
    if not values:
        return {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}
    cuts = [values[0]] * 99 if len(values) == 1 else statistics.quantiles(values, n=100, method="inclusive")
    return {
        "p50": round(cuts[49] * scale, 2),
        "p90": round(cuts[89] * scale, 2),
        "p99": round(cuts[98] * scale, 2),
        "max": round(max(values) * scale, 2),
    }
