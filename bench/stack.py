"""A `tandem up` of a benchmark's own: started on free ports, watched, stopped.

Life cycle: `with Stack(flags) as stack:` starts the processes and waits until they say ready -> `stack.gateway` ->
`stack.processes()` -> the end of the block stops them, and kills what is left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from types import TracebackType

import psutil

from tandem.errors import UnavailableError

READY_SECONDS = 180.0
STOP_SECONDS = 60.0
COMMAND = (sys.executable, "-m", "tandem.cli", "up", "--gateway", "127.0.0.1:0", "--http", "127.0.0.1:0")


class Stack:
    """One running Tandem."""

    def __init__(self, flags: Sequence[str], command: Sequence[str] = COMMAND) -> None:
        """`flags` of `tandem up`; `command` stands for it in tests."""
        self._command = [*command, *flags]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.gateway = ""
        """HOST:PORT."""

    def __enter__(self) -> Stack:
        """Starts and waits. Raises UnavailableError, with the end of the log, when it doesn't get ready."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        try:
            self._await_ready(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def _await_ready(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        watchdog = threading.Timer(READY_SECONDS, process.kill)
        watchdog.start()
        try:
            for line in process.stdout:
                if line.startswith("ready "):
                    self.gateway = dict(part.split("=", 1) for part in line.split()[1:])["gateway"]
                    # Read on, or it would stand still once the pipe is full.
                    self._reader = threading.Thread(target=process.stdout.read, daemon=True)
                    self._reader.start()
                    return
        finally:
            watchdog.cancel()
        self._log.seek(0)
        raise UnavailableError(f"tandem up did not get ready: {self._log.read()[-2000:]}")

    def processes(self) -> list[psutil.Process]:
        """The launcher and all services, oldest first."""
        assert self._process is not None
        launcher = psutil.Process(self._process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops it."""
        self._stop()

    def _stop(self) -> None:
        process = self._process
        assert process is not None
        left: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            left = self.processes()[1:]
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in left:
            with contextlib.suppress(psutil.Error):
                child.kill()
        if self._reader is not None:
            self._reader.join()
        assert process.stdout is not None
        process.stdout.close()
        self._log.close()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
