"""The set of workers, which may change while the gateway runs.

Life cycle: `WorkerPool(...)` -> `set_addresses` as often as needed (a source does, by `found`) -> `close()`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from gateway.discovery.source import Addresses
from gateway.fit import mismatch
from gateway.workers import Worker
from tandem.service.logging import get_logger
from tandem.service.tls import Tls

_log = get_logger(__name__)


class WorkerPool:
    """All workers that are listed. `changed` callbacks run after every change of any of them."""

    def __init__(self, *, silence: float = 3.0, tls: Tls | None = None) -> None:
        """`silence`: seconds without a load report after which a worker counts as lost. `tls`: how to call them."""
        self._silence, self._tls = silence, tls
        self._workers: dict[tuple[str, str], Worker] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._gone: set[asyncio.Task[None]] = set()
        self._listeners: list[Callable[[], None]] = []
        self._reported: set[tuple[str, str]] = set()
        self.failed_lookups = 0
        """How often a source was in trouble."""

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

    def found(self, addresses: Addresses) -> None:
        """A source's report: exactly these."""
        self.set_addresses(addresses.prefill, addresses.decode)

    def trouble(self, reason: str) -> None:
        """A source's report: it could not look. It has logged why."""
        self.failed_lookups += 1

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
        tasks = [*self._tasks.values(), *self._gone]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))
