"""Starts the ranks of an engine or a worker as processes, as torchrun would."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 120
"""After which whoever still lives is killed, so that nothing hangs."""


@dataclass
class RankProcess:
    """One of them; `log` is its stderr."""

    process: subprocess.Popen[str]
    log: Path

    def read(self) -> Any:
        """Its next line of JSON."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return json.loads(line)

    def ended(self) -> tuple[int, str]:
        """Waits for its end: exit code, and what it said."""
        return self.process.wait(SECONDS), self.log.read_text()


@contextlib.contextmanager
def rank_processes(command: Sequence[str], size: int, folder: Path) -> Iterator[list[RankProcess]]:
    """`size` processes of `command`; none is left afterwards."""
    started: list[RankProcess] = []
    watchdog = threading.Timer(SECONDS, lambda: _kill(started))
    watchdog.start()
    port = _free_port()
    try:
        for rank in range(size):
            started.append(_start(command, rank, size, port, folder / f"rank-{port}-{rank}.log"))
        yield started
    finally:
        watchdog.cancel()
        _kill(started)


def _start(command: Sequence[str], rank: int, size: int, port: int, log: Path) -> RankProcess:
    world = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **{name: str(value) for name, value in world.items()}},
        )
    return RankProcess(process, log)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _kill(started: list[RankProcess]) -> None:
    for one in started:
        one.process.kill()
        one.process.wait()
        for pipe in (one.process.stdin, one.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
