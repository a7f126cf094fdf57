"""Workers that a file lists, watched for changes (`--workers-file`). `tandem up` and `tandem scale` write it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from gateway.discovery.source import Addresses, Report
from tandem.errors import ConfigError
from tandem.service import address as addresses
from tandem.service.logging import get_logger

_log = get_logger(__name__)

POLL_SECONDS = 0.2
MAX_FILE_BYTES = 1 << 20


def read_workers_file(path: Path) -> Addresses:
    """What the file lists. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"--workers-file: {path} is larger than {MAX_FILE_BYTES} bytes")
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"--workers-file: {path} can't be read: {exc}") from exc
    if not isinstance(value, dict) or not value.keys() <= {"prefill", "decode"}:
        raise ConfigError(f'--workers-file: {path} must hold {{"prefill": [...], "decode": [...]}} and nothing else')
    return Addresses(_checked(value.get("prefill", []), path), _checked(value.get("decode", []), path))


def _checked(items: object, path: Path) -> tuple[str, ...]:
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"--workers-file: {path} must hold lists of HOST:PORT")
    return tuple(str(addresses.parse(item, flag="--workers-file")) for item in items)


class WorkersFile:
    """Read at the start, and again whenever it changes; a bad change leaves the last good list in place."""

    def __init__(self, path: Path) -> None:
        """Reads nothing yet."""
        self._path = path
        self._task: asyncio.Task[None] | None = None

    def start(self, report: Report) -> None:
        """Raises ConfigError when the file is bad now."""
        stamp = _stamp(self._path)
        report.found(read_workers_file(self._path))
        self._task = asyncio.create_task(self._poll(report, stamp), name="watch workers file")

    async def _poll(self, report: Report, last: tuple[int, int, int] | None) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            now = _stamp(self._path)
            if now == last:
                continue
            last = now
            try:
                report.found(read_workers_file(self._path))
            except ConfigError as exc:
                _log.error("the workers' file is bad; keeping the last good one", error=str(exc))
                report.trouble(str(exc))

    async def close(self) -> None:
        """Watches no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
