"""The engine alone as a child process that measures when asked, so that a bench of the services can take turns with it.

On a machine that drifts by a fifth within minutes, two figures compare only if they were taken seconds apart. Life:
`async with EngineAlone(points)` loads the model -> `measure(point)` as often as needed -> the child ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from bench.points import Point
from tandem.errors import InternalError


class EngineAlone:
    """`python -m bench.offline --stdin`. Idle, and asleep, between two calls of `measure`."""

    def __init__(self, points: Sequence[Point], model: str = "default") -> None:
        """`points`: all that will be asked for."""
        names = ",".join(point.name for point in points)
        self._command = [sys.executable, "-m", "bench.offline", "--model", model, "--points", names, "--stdin"]
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        """Starts the child; it loads while the first `measure` waits."""
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the child."""
        process, to_child, _ = self._pipes()
        to_child.close()
        await process.wait()

    async def measure(self, point: Point) -> float:
        """Tokens a second, one run. Raises InternalError when the child has died."""
        _, to_child, from_child = self._pipes()
        to_child.write(f"{point.name}\n".encode())
        line = await from_child.readline()
        if not line:
            raise InternalError("the engine's process has ended; its error is above")
        return float(json.loads(line)["tokens_per_s"])

    def _pipes(self) -> tuple[asyncio.subprocess.Process, asyncio.StreamWriter, asyncio.StreamReader]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise InternalError("the engine's process was not started")
        return process, process.stdin, process.stdout
