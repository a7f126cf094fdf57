"""Measuring processes: each prints one JSON line per point, may crash or hang, and never takes the rest down."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

SILENCE_SECONDS = 900
"""A process that finishes no point for this long is ended; a long point takes minutes."""
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Measurement:
    """One system at one point, once: a rate, or why there is none."""

    point: str
    tokens_per_s: float | None
    why: str = ""


def measure_points(
    command: Callable[[Sequence[str]], Sequence[str]], points: Sequence[str], silence_seconds: float = SILENCE_SECONDS
) -> Iterator[Measurement]:
    """Runs `command(points)` and yields one measurement per point, in order.

    When the process ends early, the point it was at is given up and a new process goes on behind it; one that measured
    nothing at all is not started again.
    """
    todo = list(points)
    while todo:
        process = _Measuring(command(todo), silence_seconds)
        measured = 0
        for row in process.rows():
            if measured < len(todo) and row.get("point") == todo[measured]:
                measured += 1
                yield Measurement(str(row["point"]), float(str(row["tokens_per_s"])))
        todo = todo[measured:]
        if todo and not measured:
            yield from (Measurement(point, None, process.why) for point in todo)
            return
        if todo:
            yield Measurement(todo.pop(0), None, process.why)


class _Measuring:
    """One process. `rows()` yields what it prints until it ends or stays silent for too long; then `why` says how."""

    def __init__(self, command: Sequence[str], silence_seconds: float) -> None:
        self.command = command
        self.silence_seconds = silence_seconds
        self.why = ""
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def rows(self) -> Iterator[Mapping[str, object]]:
        """What the command prints, a JSON object a line, until it ends or is silent for too long; `why` says which."""
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            assert process.stdout is not None
            reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
            reader.start()
            try:
                yield from self._until_silent(process)
            finally:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0 if self.why else 30)
                stop_group(process)
                reader.join(5)
                process.stdout.close()
                self.why = self.why or _ending(process.returncode, errors)

    def _read(self, stream: IO[str]) -> None:
        with contextlib.suppress(ValueError):  # closed under us: we were not waited for
            for line in stream:
                self._lines.put(line)
        self._lines.put(None)

    def _until_silent(self, process: subprocess.Popen[str]) -> Iterator[Mapping[str, object]]:
        deadline = time.monotonic() + self.silence_seconds
        while True:
            # Children may hold the pipe open after their parent's end, so an ended process is looked for too.
            over = process.poll() is not None
            try:
                line = self._lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if over:
                    return
                if time.monotonic() > deadline:
                    self.why = f"no figure within {self.silence_seconds:.0f} s"
                    return
                continue
            if line is None:
                return
            with contextlib.suppress(json.JSONDecodeError):
                if isinstance(row := json.loads(line), dict):
                    deadline = time.monotonic() + self.silence_seconds
                    yield row


def stop_group(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Ends what is left of a process that leads its own group, and of its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(code: int, errors: IO[bytes]) -> str:
    """How a process ended, with the last thing it complained about."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if "Error" in line or "error" in line] or lines
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
    return f"{how}: {said[-1][:200]}" if said else how
