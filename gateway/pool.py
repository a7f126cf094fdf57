"""The set of workers, which may change while the gateway runs.

Life cycle: `WorkerPool(...)` -> `set_addresses` as often as needed (a source does, by `found`) -> `close()`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from gateway.breaker import Ejecting
from gateway.discovery.source import Addresses
from gateway.fit import mismatch
from gateway.workers import Worker
from tandem.service.logging import get_logger
from tandem.service.tls import Tls

_log = get_logger(__name__)


class WorkerPool:
    """All workers that are listed. `changed` callbacks run after every change of any of them."""

    def __init__(self, *, silence: float = 3.0, tls: Tls | None = None, ejecting: Ejecting | None = None) -> None:
        """`silence`: seconds without a load report after which a worker counts as lost. `tls`: how to call them."""
        self._ejecting = ejecting or Ejecting()
        self.ejections = {"prefill": 0, "decode": 0}
        self._spared: set[str] = set()
        """Incarnations that were not ejected, as far as that was logged."""
        self._silence, self._tls = silence, tls
        self._workers: dict[tuple[str, str], Worker] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._leaving: dict[asyncio.Task[None], Worker] = {}
        """Not listed any more, but requests run there."""
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
            worker = Worker(
                role,
                address,
                self._notify,
                silence=self._silence,
                tls=self._tls,
                ejecting=self._ejecting,
                may_eject=self._may_eject,
            )
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
        self._leaving[task] = worker
        task.add_done_callback(self._leaving.pop)

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

    def _kind(self, worker: Worker) -> list[Worker]:
        """It and those that could do its work, dead or draining ones left out."""
        peers = self.prefill if worker.role == "prefill" else self.decode
        same = (worker.info.model_id, worker.info.numerics_id)
        up = [peer for peer in peers if peer.connected and not peer.draining]
        return [peer for peer in up if (peer.info.model_id, peer.info.numerics_id) == same]

    def _may_eject(self, worker: Worker) -> bool:
        """At most half of those that can do the same work, so never the last: that is said instead."""
        if self._workers.get((worker.role, worker.address)) is not worker:
            return False  # it has left
        kind = self._kind(worker)
        ejected = sum(not peer.breaker.closed for peer in kind if peer is not worker)
        if 2 * (ejected + 1) <= len(kind):
            self.ejections[worker.role] += 1
            return True
        if worker.info.incarnation not in self._spared:
            self._spared.add(worker.info.incarnation)
            _log.error(
                "worker fails request after request, but too few others could do its work: it is kept",
                worker_role=worker.role,
                address=worker.address,
                others=len(kind) - ejected - 1,
            )
        return False

    def _take_back(self) -> None:
        """Where others have gone meanwhile, workers that fail are better than none."""
        for worker in self._workers.values():
            kind = [] if worker.breaker.closed else self._kind(worker)
            if kind and all(not peer.breaker.closed for peer in kind):
                _log.error("ejected workers are taken back: no other is left", worker_role=worker.role)
                for peer in kind:
                    peer.breaker.take_back()

    def _notify(self) -> None:
        self._take_back()
        for listener in self._listeners:
            listener()

    async def close(self) -> None:
        """Ends all watching and every channel."""
        tasks = [*self._tasks.values(), *self._leaving]
        workers = [*self._workers.values(), *self._leaving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in workers))
