"""How a streaming call of grpc.aio really ended.

When the peer ends a call while a message is being written, grpc.aio (1.85) makes the failed write the call's status,
INTERNAL without the peer's words, before or after the peer's own status came. Who needs the peer's words watches from
the start: `CallStatus(call)` as soon as the call exists, `await error(exc)` when something raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc

_T = TypeVar("_T")
_FAILED_WRITE = "Internal error from Core"
PATIENCE_SECONDS = 1.0


class CallStatus:
    """Keeps the peer's status of one call. Of the event loop."""

    def __init__(self, call: Any) -> None:
        """`call` is a grpc.aio call that has not ended."""
        self._peer: grpc.aio.AioRpcError | None = None
        self._known = asyncio.Event()
        call.add_done_callback(self._on_status)

    def _on_status(self, call: Any) -> None:
        """Called at every change of the status, while it is what it was changed to."""
        details = _now(call.details())
        if details != _FAILED_WRITE:
            no_metadata = grpc.aio.Metadata()
            trailing = _now(call.trailing_metadata())
            self._peer = grpc.aio.AioRpcError(_now(call.code()), no_metadata, trailing, details)
            self._known.set()

    async def error(self, exc: grpc.aio.AioRpcError, patience: float = PATIENCE_SECONDS) -> grpc.aio.AioRpcError:
        """The peer's status in place of `exc`, if `exc` is but the failed write; waits `patience` seconds for it."""
        if exc.details() != _FAILED_WRITE:
            return exc
        try:
            await asyncio.wait_for(self._known.wait(), patience)
        except TimeoutError:
            return exc
        return self._peer or exc


def _now(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: _T = stop.value
        return result
    coroutine.close()
    raise RuntimeError("the status of an ended call isn't there")
