"""One place for a worker, kept filled.

    starting -> ready -> (process ends) -> waiting -> starting ...        stop(): stopping -> stopped

A worker that dies is restarted after a wait that doubles from half a second to half a minute and starts over once one
has lived for a minute. The first start is different: its failure is the user's to see, so `start` raises.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from tandem.errors import ConfigError, UnavailableError
from tandem.service.logging import get_logger
from tandem.supervisor.process import LogLine, Process, Ready
from tandem.supervisor.settings import Role

_log = get_logger(__name__)

FIRST_WAIT, LONGEST_WAIT, STABLE_AFTER = 0.5, 30.0, 60.0
START_SECONDS = 600.0
"""The first start on a machine compiles kernels; a large model takes its time to load."""


class State(Enum):
    """Where a slot stands."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Slot:
    """Keeps one worker running. Belongs to the event loop."""

    def __init__(
        self,
        role: Role,
        index: int,
        arguments: Callable[[], list[str]],
        changed: Callable[[], None],
        log: LogLine,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`arguments` gives the flags of the next start; `changed` is called whenever addresses may differ.

        `variables` of the environment are this worker's own.
        """
        self.role, self.index = role, index
        self.name = f"{role}-{index}"
        self.state = State.STARTING
        self.said: Ready | None = None
        self.restarts = 0
        self.process: Process | None = None
        self._arguments, self._changed, self._log_line = arguments, changed, log
        self._variables = variables
        self._started = time.monotonic()
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the worker and keeps it running from then on. Raises ConfigError when the first start fails."""
        try:
            await self._start_once()
        except UnavailableError as exc:
            self.state = State.STOPPED
            raise ConfigError(f"{self.name} did not start: {exc}") from exc
        self._keeper = asyncio.ensure_future(self._keep())

    async def stop(self, grace: float) -> None:
        """Ends the worker: SIGTERM, `grace` seconds, SIGKILL."""
        self.retire()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self.process is not None:
            await self.process.stop(grace)
        self.state = State.STOPPED

    def retire(self) -> None:
        """Takes it out of the workers file; the process goes on until `stop`."""
        self.state, self.said = State.STOPPING, None
        self._changed()

    def kill(self) -> None:
        """SIGKILL at once."""
        if self.process is not None:
            self.process.kill()

    def describe(self) -> dict[str, Any]:
        """For `tandem status`."""
        said = self.said
        return {
            "name": self.name,
            "role": self.role,
            "state": self.state.value,
            "ready": self.state is State.READY,
            "pid": self.process.pid if self.process is not None and self.process.returncode is None else None,
            "address": said.address if said else "",
            "metrics": (said.http or said.metrics) if said else "",
            "incarnation": said.incarnation if said else "",
            "uptime_seconds": round(time.monotonic() - self._started, 1) if said else 0.0,
            "restarts": self.restarts,
        }

    async def _start_once(self) -> None:
        """One start. Raises UnavailableError with the worker's own words."""
        self.state = State.STARTING
        self.process = await Process.launch(self.name, self.role, self._arguments(), self._log_line, self._variables)
        try:
            async with asyncio.timeout(START_SECONDS):
                self.said = await self.process.ready()
        except TimeoutError:
            self.process.kill()
            raise UnavailableError(f"not ready after {START_SECONDS:.0f} s") from None
        if self.said is None:
            raise UnavailableError(self.process.error_line())
        self._started = time.monotonic()
        self.state = State.READY
        self._changed()

    async def _keep(self) -> None:
        wait = FIRST_WAIT
        while True:
            if self.process is not None and self.said is not None:
                code = await self.process.exited()
                await self.process.reap()
                self.said = None
                wait = FIRST_WAIT if time.monotonic() - self._started > STABLE_AFTER else wait
                _log.warning("worker died; restarting", worker=self.name, exit_code=code, wait_seconds=wait)
            self.state = State.WAITING
            self._changed()
            await asyncio.sleep(wait)
            wait = min(wait * 2, LONGEST_WAIT)
            self.restarts += 1
            try:
                await self._start_once()
            except (UnavailableError, OSError) as exc:
                _log.error("worker did not start", worker=self.name, error=str(exc), wait_seconds=wait)
