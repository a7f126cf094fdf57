"""What is read from files and read again when they change: certificates, keys of tenants.

Life cycle: `Reloaded(...)` reads at once and raises what is wrong -> `get()` as often as needed: it looks at the files'
times and sizes, and reads again when they differ. A bad change is logged once, and what was good before stays.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from tandem.errors import ConfigError
from tandem.service.logging import get_logger

_log = get_logger(__name__)

T = TypeVar("T")
Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp | None:
    """Time of the last change (ns), inode and bytes of a file, links followed; None when it isn't there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


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
    """Raises ConfigError for a file that others could change; one that others can read is told in the log."""
    try:
        found = path.stat()
    except OSError as exc:
        raise ConfigError(f"{flag}: {path} can't be read: {exc.strerror or exc}") from exc
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{flag}: {path} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{flag}: others can write {path}; chmod go-w it")
    if found.st_mode & stat.S_IROTH:
        _log.warning("everybody on this machine can read a secret file", flag=flag, path=str(path))


class Reloaded(Generic[T]):
    """A value made from files. Thread-safe."""

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], what: str) -> None:
        """`read` makes the value and raises ConfigError; `what` names it in the log."""
        self._paths, self._read, self._what = tuple(paths), read, what
        self._lock = threading.Lock()
        self._stamps = self._look()
        self._value = read()
        self.version = 1
        """Grows with every value."""

    def get(self) -> T:
        """The value as the files have it now, or had it when they were last good."""
        with self._lock:
            now = self._look()
            if now != self._stamps:
                # Before reading: files that change meanwhile differ again at the next call.
                self._stamps = now
                self._reload()
            return self._value

    def _reload(self) -> None:
        try:
            self._value = self._read()
        except ConfigError as exc:
            _log.error(f"{self._what} can't be renewed; the last good one stays", error=str(exc))
            return
        self.version += 1
        _log.info(f"{self._what} renewed")

    def _look(self) -> tuple[Stamp | None, ...]:
        return tuple(stamp(path) for path in self._paths)
