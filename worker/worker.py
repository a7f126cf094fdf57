"""What a prefill and a decode worker have in common: the open calls, whoever watches the load, the drain.

Belongs to the event loop. Life cycle: made -> `start()` -> calls come and go -> `drain(grace)`: nothing new is
admitted, what can finish within the grace does, then the calls that are left end as DRAINING -> `stop()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from tandem.errors import DrainingError, TandemError
from tandem.service.logging import get_logger
from worker.engine_loop import EngineLoop
from worker.identity import WorkerIdentity

_log = get_logger(__name__)
LAST_WORDS_SECONDS = 2.0
"""How long the ends of drained calls may take to go out."""
LOAD_INTERVAL = 0.05
"""Least seconds between two loads to one watcher."""
LOAD_BEAT = 1.0


class Call(Protocol):
    """What belongs to one open RPC."""

    def fail(self, error: TandemError) -> None:
        """End it with an error; the first one stays."""
        ...


C = TypeVar("C", bound=Call)


class Worker(ABC, Generic[C]):
    """A worker without its RPCs. C is what it keeps for each open call."""

    role: ClassVar[str]
    engine: EngineLoop[Any, Any, Any]

    def __init__(self, identity: WorkerIdentity) -> None:
        """Subclasses make the engine."""
        self.identity = identity
        self.draining = False
        self.stopping = False
        self._calls: dict[str, C] = {}
        self._watchers: set[asyncio.Event] = set()
        self._nobody = asyncio.Event()
        self._nobody.set()

    def start(self) -> None:
        """Start the engine thread."""
        self.engine.start()

    @abstractmethod
    async def stop(self) -> None:
        """End everything at once; idempotent."""

    async def drain(self, grace: float) -> None:
        """Take nothing new, let calls finish for `grace` seconds, then end the rest as DRAINING; stop."""
        self.draining = True
        self._wake_watchers()
        if not await self._all_gone(grace):
            _log.info("handing requests back", requests=len(self._calls))
            for call in list(self._calls.values()):
                call.fail(DrainingError(f"this {self.role} worker is about to stop", retry_after=0.0))
            await self._all_gone(LAST_WORDS_SECONDS)
        await self.stop()

    @property
    def open_calls(self) -> int:
        """Requests aboard."""
        return len(self._calls)

    def check_open(self) -> None:
        """Raises DrainingError when nothing new is taken any more."""
        if self.draining:
            raise DrainingError(f"this {self.role} worker takes nothing new: it is about to stop", retry_after=0.0)

    def stopped_error(self) -> DrainingError:
        """What ends a call when the worker has stopped."""
        return DrainingError(f"this {self.role} worker has stopped", retry_after=0.0)

    async def load_changes(self) -> AsyncGenerator[None, None]:
        """Yields when the load is to be told.

        On change, at most 20 times a second; at least once a second while the engine turns. Close it with
        `contextlib.aclosing`. Raises DrainingError when the worker has stopped.
        """
        told_draining = False
        with self._watching() as changed:
            while not self.stopping:
                changed.clear()
                if self.engine.alive or self.draining != told_draining:
                    told_draining = self.draining
                    yield
                await asyncio.sleep(LOAD_INTERVAL)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), LOAD_BEAT - LOAD_INTERVAL)
        raise self.stopped_error()

    # -- for the subclasses

    def _new_key(self) -> str:
        """Names one call, here and in the scheduler."""
        return secrets.token_hex(12)

    def _enter(self, key: str, call: C) -> None:
        self._calls[key] = call
        self._nobody.clear()

    def _leave(self, key: str) -> C | None:
        call = self._calls.pop(key, None)
        if not self._calls:
            self._nobody.set()
        return call

    def _on_load(self, _load: object) -> None:
        self._wake_watchers()

    def _wake_watchers(self) -> None:
        for event in self._watchers:
            event.set()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[asyncio.Event]:
        """An event that is set at every change of the load."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            yield event
        finally:
            self._watchers.discard(event)

    async def _all_gone(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._nobody.wait(), seconds)
        except TimeoutError:
            return False
        return True
