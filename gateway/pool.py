"""The set of workers: from flags, or from a file that may change while the gateway runs.

Life cycle: `WorkerPool(...)` -> `start()` -> `set_addresses` as often as needed (the file's watcher does) -> `close()`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from gateway.fit import mismatch
from gateway.workers import Worker
from tandem.errors import ConfigError
from tandem.service import address as addresses
from tandem.service.logging import get_logger
from tandem.service.tls import Tls

_log = get_logger(__name__)

POLL_SECONDS = 0.2
MAX_FILE_BYTES = 1 << 20
Addresses = tuple[tuple[str, ...], tuple[str, ...]]


def read_workers_file(path: Path) -> Addresses:
    """(prefill, decode) addresses. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"--workers-file: {path} is larger than {MAX_FILE_BYTES} bytes")
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--workers-file: {path} can't be read: {exc}") from exc
    if not isinstance(value, dict) or not value.keys() <= {"prefill", "decode"}:
        raise ConfigError(f'--workers-file: {path} must hold {{"prefill": [...], "decode": [...]}} and nothing else')
    return _checked(value.get("prefill", []), path), _checked(value.get("decode", []), path)


def _checked(items: object, path: Path) -> tuple[str, ...]:
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"--workers-file: {path} must hold lists of HOST:PORT")
    return tuple(str(addresses.parse(item, flag="--workers-file")) for item in items)


class WorkerPool:
    """All workers that are listed. `changed` callbacks run after every change of any of them."""

    def __init__(self, *, silence: float = 3.0, tls: Tls | None = None) -> None:
        """`silence`: seconds without a load report after which a worker counts as lost. `tls`: how to call them."""
        self._silence, self._tls = silence, tls
        self._workers: dict[tuple[str, str], Worker] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._gone: set[asyncio.Task[None]] = set()
        self._file_task: asyncio.Task[None] | None = None
        self._listeners: list[Callable[[], None]] = []
        self._reported: set[tuple[str, str]] = set()

    def on_change(self, listener: Callable[[], None]) -> None:
        """`listener` must be quick and must not raise."""
        self._listeners.append(listener)

    @property
    def prefill(self) -> list[Worker]:
        """Listed prefill workers, ready or not."""
        return [worker for worker in self._workers.values() if worker.role == "prefill"]

    @property
    def decode(self) -> list[Worker]:
        """Listed decode workers, ready or not."""
        return [worker for worker in self._workers.values() if worker.role == "decode"]

    @property
    def serving(self) -> bool:
        """A decode worker is ready, and a prefill worker that fits it where any is listed."""
        decode = [worker for worker in self.decode if worker.ready]
        if not self.prefill:
            return bool(decode)
        prefill = [worker for worker in self.prefill if worker.ready]
        return any(mismatch(one.traits, other.traits) is None for one in prefill for other in decode)

    def set_addresses(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        """Lists exactly these; workers that left get nothing new, and what runs there goes on."""
        wanted = {("prefill", address) for address in prefill} | {("decode", address) for address in decode}
        for key in self._workers.keys() - wanted:
            worker, task = self._workers.pop(key), self._tasks.pop(key)
            task.cancel()
            worker.connected = False
            self._retire(worker)
        for role, address in wanted - self._workers.keys():
            worker = Worker(role, address, self._notify, silence=self._silence, tls=self._tls)
            self._workers[role, address] = worker
            self._tasks[role, address] = asyncio.create_task(worker.watch(), name=f"watch {role} {address}")
        self._notify()

    def follow(self, path: Path) -> None:
        """Reads the workers' file now (ConfigError when it is bad) and again whenever it changes."""
        self.set_addresses(*read_workers_file(path))
        self._file_task = asyncio.create_task(self._poll(path, _stamp(path)), name="watch workers file")

    async def _poll(self, path: Path, last: tuple[int, int, int] | None) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            now = _stamp(path)
            if now is None or now == last:
                continue
            last = now
            try:
                self.set_addresses(*read_workers_file(path))
            except ConfigError as exc:
                _log.error("the workers' file is bad; keeping the last good one", error=str(exc))

    def _retire(self, worker: Worker) -> None:
        async def close_when_idle() -> None:
            await worker.idle.wait()
            await worker.close()

        task = asyncio.create_task(close_when_idle(), name=f"retire {worker.address}")
        self._gone.add(task)
        task.add_done_callback(self._gone.discard)

    def report_mismatch(self, prefill: Worker, decode: Worker) -> str:
        """Says why two workers can't be paired; in the log once per pair of incarnations."""
        text = (
            f"prefill worker {prefill.address} and decode worker {decode.address} can't be paired: "
            f"{mismatch(prefill.traits, decode.traits)}"
        )
        key = (prefill.info.incarnation, decode.info.incarnation)
        if key not in self._reported:
            self._reported.add(key)
            _log.error("workers can't be paired", problem=text)
        return text

    def _notify(self) -> None:
        for listener in self._listeners:
            listener()

    async def close(self) -> None:
        """Ends all watching and every channel."""
        tasks = [*self._tasks.values(), *self._gone, *([self._file_task] if self._file_task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
