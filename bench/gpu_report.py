"""What `bench.gpu_check` says: JSON lines, to standard output and to a file, a short table at the end, and its time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

LIMIT_S = 520.0
"""Nothing is begun later, so that all ends within 9 minutes."""
TABLE = ("ms", "floor_ms", "ratio", "gb_per_s", "tflops")
STEP_TABLE = ("tokens_per_s", "step_ms", "floor_ms", "host_ms", "replay_ms", "tflops")

Row = Mapping[str, object]


class Report:
    """Rows as they come. A context manager: the file is closed at its end."""

    def __init__(
        self, path: Path, limit_s: float = LIMIT_S, *, clock: Callable[[], float] = time.monotonic, echo: bool = True
    ) -> None:
        """Time runs from now, in seconds of `clock`. `path`'s folder is made; OSError when it can't be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._clock, self._end, self._echo = clock, clock() + limit_s, echo
        self.rows: list[Row] = []

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()

    def say(self, **row: object) -> None:
        """One row, at once: what was measured is there whatever comes after."""
        self.rows.append(row)
        line = json.dumps(row)
        print(line, file=self._file, flush=True)
        if self._echo:
            print(line, flush=True)

    def left_s(self) -> float:
        """Seconds until nothing more is begun; not below 0."""
        return max(0.0, self._end - self._clock())

    def skips(self, what: str, needed_s: float = 0.0) -> bool:
        """Whether the time left is gone, or less than `needed_s`: then a row says that `what` was skipped."""
        left = self.left_s()
        if left > 0 and left >= needed_s:
            return False
        self.say(skipped=what, left_s=round(left), needed_s=needed_s)
        return True

    @property
    def skipped(self) -> int:
        """Rows of what was skipped."""
        return sum("skipped" in row for row in self.rows)


def table(rows: list[Row]) -> str:
    """Markdown: kernels beside their floors, then whole steps. Empty where nothing was measured."""
    cases = _table("case", TABLE, [row for row in rows if "ms" in row])
    steps = _table("point", STEP_TABLE, [_step(row) for row in rows if "point" in row])
    return "\n".join(part for part in (cases, steps) if part)


def _step(row: Row) -> Row:
    return {**row, "point": f"{row['point']}, {row['way']}" if "way" in row else row["point"]}


def _table(name: str, columns: tuple[str, ...], rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [f"| {name} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for row in rows:
        cells = [str(row.get(column, "")) for column in columns]
        lines.append(f"| {row[name]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
