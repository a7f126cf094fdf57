"""What is read from files and read again when they change: certificates, keys of tenants.

Life cycle: `Reloaded(...)` reads at once and raises what is wrong -> `get()` as often as needed: it looks at the files'
times and sizes, and reads again when they differ. After a bad change what was good before stays, and it tries again
every few seconds, since what was wrong may pass without a trace in the files; each complaint is logged once.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from tandem.errors import ConfigError
from tandem.service.logging import get_logger

_log = get_logger(__name__)

T = TypeVar("T")
Stamp = tuple[int, int, int, int]
RETRY_SECONDS = 3.0
"""Least time between two tries to read files that didn't change."""


def stamp(path: Path) -> Stamp | None:
    """Times (ns) of the last change of contents and of anything, inode and bytes of a file, links followed; None when
    it isn't there.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def read_bounded(path: Path, flag: str, most: int) -> bytes:
    """The whole file. Raises ConfigError that names `flag`, also for one of more than `most` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as exc:
        raise ConfigError(f"{flag}: {path} can't be read: {exc.strerror or exc}") from exc
    if len(data) > most:
        raise ConfigError(f"{flag}: {path} is larger than {most} bytes")
    return data


def check_private(path: Path, flag: str) -> None:
    """Raises ConfigError for a file that others could change."""
    try:
        found = path.stat()
    except OSError as exc:
        raise ConfigError(f"{flag}: {path} can't be read: {exc.strerror or exc}") from exc
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{flag}: {path} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{flag}: others can write {path}; chmod go-w it")


def tell_if_readable(path: Path, flag: str) -> None:
    """Warns of a secret file that everybody can read."""
    with contextlib.suppress(OSError):
        if not path.stat().st_mode & stat.S_IROTH:
            return
        _log.warning("everybody on this machine can read a secret file", flag=flag, path=str(path))


class Reloaded(Generic[T]):
    """A value made from files. Thread-safe."""

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], T],
        what: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ) -> None:
        """`read` makes the value and raises ConfigError; `what` names it in the log, which a `quiet` one doesn't use:
        in a program of somebody else's. `clock` is in seconds.
        """
        self._quiet = quiet
        self._paths, self._read, self._what, self._clock = tuple(paths), read, what, clock
        self._lock = threading.Lock()
        self._stamps = self._look()
        self._value = read()
        self._version = 1
        self._retry_at = math.inf
        self._complaint = ""

    def get(self) -> T:
        """The value as the files have it now, or had it when they were last good."""
        return self.current()[0]

    def current(self) -> tuple[T, int]:
        """The same with its version, which grows with every value."""
        with self._lock:
            now = self._look()
            if now != self._stamps or self._clock() >= self._retry_at:
                # Before reading: files that change meanwhile differ again at the next call.
                self._stamps = now
                self._reload()
            return self._value, self._version

    def _reload(self) -> None:
        self._retry_at = self._clock() + RETRY_SECONDS  # whatever the reading ends with
        try:
            value = self._read()
        except ConfigError as exc:
            if str(exc) != self._complaint and not self._quiet:
                _log.error(f"{self._what} can't be renewed; the last good one stays", error=str(exc))
            self._complaint = str(exc)
            return
        self._retry_at, self._complaint = math.inf, ""
        if value != self._value:  # a changed mode or time alone isn't worth new connections
            self._value = value
            self._version += 1
        if not self._quiet:
            _log.info(f"{self._what} renewed")

    def _look(self) -> tuple[Stamp | None, ...]:
        return tuple(stamp(path) for path in self._paths)
