"""What `tandem up` shows while it works: progress, and workers' log lines, on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys

from rich.console import Console
from rich.status import Status
from rich.text import Text

_COLORS = {"debug": "dim", "info": "green", "warning": "yellow", "error": "red", "critical": "red"}
_HIDDEN = ("event", "level", "role", "timestamp", "logger", "exception")


def say(text: str, end: str = "\n") -> None:
    """Prints to stdout at once. A reader that has gone (`tandem up | head -1`) or a full disk is no reason to stop
    serving.
    """
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(text: str) -> None:
    """Prints to stderr, if somebody reads it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Terminal:
    """A spinner with the current step on a terminal; one plain line a step elsewhere. `close` ends the spinner.

    A terminal or pipe that has gone away is no error: a worker whose log nobody takes would stand still.
    """

    def __init__(self) -> None:
        """Decides by whether stderr is a terminal."""
        self._console = Console(stderr=True, highlight=False)
        self._status: Status | None = None

    def progress(self, step: str) -> None:
        """Shows what happens now. What is ready stays on the screen."""
        if not self._console.is_terminal:
            tell(f"tandem: {step}")
            return
        with contextlib.suppress(OSError):
            self._spin(step)

    def _spin(self, step: str) -> None:
        if " ready after " in step:
            self._console.print(Text(f"  {step}", style="dim"))
            return
        if self._status is None:
            self._status = self._console.status(step)
            self._status.start()
        self._status.update(step)

    def close(self) -> None:
        """Takes the spinner away."""
        if self._status is not None:
            with contextlib.suppress(OSError):
                self._status.stop()
            self._status = None

    def log(self, worker: str, line: str) -> None:
        """One line of a worker's log: readable on a terminal, JSON with the worker's name elsewhere."""
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            self._plain(f"{worker}: {line}")
        elif self._console.is_terminal:
            self._print(_readable(worker, entry))
        else:
            tell(json.dumps({"worker": worker, **entry}, ensure_ascii=False))

    def _plain(self, text: str) -> None:
        if self._console.is_terminal:
            self._print(Text(text))
        else:
            tell(text)

    def _print(self, text: Text) -> None:
        with contextlib.suppress(OSError):
            self._console.print(text, soft_wrap=True)


def _readable(worker: str, entry: dict[str, object]) -> Text:
    level = str(entry.get("level", "info"))
    text = Text()
    text.append(f"{level:8}", style=_COLORS.get(level, ""))
    text.append(f"{worker}: {entry.get('event', '')}")
    for key, value in entry.items():
        if key not in _HIDDEN:
            text.append(f" {key}={value}", style="dim")
    if "exception" in entry:
        text.append(f"\n{entry['exception']}", style="dim")
    return text
