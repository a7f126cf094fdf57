"""One worker process: launched, read, stopped.

Life cycle: `await Process.launch(...)` -> `await ready()` (its JSON line) -> `await exited()` -> `await reap()`. Its
output is read all the time, so it never blocks on a full pipe. It stands in the supervisor's session, in a process
group of its own, so that a terminal's Ctrl-C reaches the supervisor alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem.supervisor import settings as settings_
from tandem.supervisor.settings import Role

TAIL_LINES = 40
MAX_LINE_BYTES = 1 << 20

LogLine = Callable[[str, str], None]
"""Takes a worker's name and one line that it logged."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What a worker says when it serves."""

    address: str
    metrics: str
    """Of a worker; a gateway's metrics are at `http`."""
    http: str
    incarnation: str


class Process:
    """A running worker. Made by `launch`."""

    def __init__(self, name: str, child: asyncio.subprocess.Process, log: LogLine) -> None:
        """Starts reading `child`'s output at once."""
        self.name = name
        self.pid = child.pid
        self._child = child
        self._log = log
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        """The last lines it wrote to stderr."""
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._readers = [asyncio.ensure_future(self._read_stdout()), asyncio.ensure_future(self._read_stderr())]

    @classmethod
    async def launch(
        cls, name: str, role: Role, arguments: list[str], log: LogLine, variables: Mapping[str, str] | None = None
    ) -> Process:
        """Starts the process, with `variables` beside those of every worker; doesn't wait until it serves."""
        child = await asyncio.create_subprocess_exec(
            *settings_.command_line(role, arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            process_group=0,
            env=settings_.environment(variables),
        )
        return cls(name, child, log)

    async def ready(self) -> Ready | None:
        """Waits for its ready line; None when it exited before."""
        exited = asyncio.ensure_future(self._child.wait())
        either: set[asyncio.Future[Any]] = {self._ready, exited}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            exited.cancel()
        if self._ready.done():
            return self._ready.result()
        await self.reap()
        return None

    async def exited(self) -> int:
        """Waits for its end; returns the exit code (negative: the signal)."""
        return await self._child.wait()

    @property
    def returncode(self) -> int | None:
        """The exit code, None while it runs."""
        return self._child.returncode

    async def stop(self, grace: float) -> None:
        """SIGTERM, then SIGKILL after `grace` seconds. Returns when it is gone."""
        self.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._child.wait()
        self.kill()
        await self._child.wait()
        await self.reap()

    def signal(self, number: int) -> None:
        """Signals the worker alone."""
        if self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(number)

    def kill(self) -> None:
        """Kills it with whatever it started (a compiler, for one)."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def reap(self) -> None:
        """Reads what it still had to say, for at most a second."""
        await asyncio.wait(self._readers, timeout=1.0)
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        if not self._ready.done():
            self._ready.cancel()

    def error_line(self) -> str:
        """What tells best why it failed: its `error: ...`, else how it ended, with the last line that it wrote."""
        lines = [line for line in self.tail if line.strip()]
        if errors := [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]:
            return errors[-1]
        return f"exit code {self._child.returncode}" + (f"; it last wrote: {lines[-1]}" if lines else "")

    async def _read_stdout(self) -> None:
        assert self._child.stdout is not None
        async for line in _lines(self._child.stdout):
            said = _ready_line(line)
            if said is None:
                self._log(self.name, line)
            elif not self._ready.done():
                self._ready.set_result(said)

    async def _read_stderr(self) -> None:
        assert self._child.stderr is not None
        async for line in _lines(self._child.stderr):
            self.tail.append(line)
            self._log(self.name, line)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines without their end; one over the limit is dropped."""
    while True:
        try:
            data = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as exc:
            if exc.partial:
                yield exc.partial.decode("utf-8", "replace").rstrip("\n")
            return
        except asyncio.LimitOverrunError as exc:
            await stream.readexactly(exc.consumed)
            continue
        yield data.decode("utf-8", "replace").rstrip("\n")


def _ready_line(line: str) -> Ready | None:
    try:
        said = json.loads(line)
    except ValueError:
        return None
    if not isinstance(said, dict) or said.get("event") != "ready":
        return None
    return Ready(
        address=str(said.get("address", "")),
        metrics=str(said.get("metrics", "")),
        http=str(said.get("http", "")),
        incarnation=str(said.get("incarnation", "")),
    )
