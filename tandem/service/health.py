"""grpc.health.v1 for "" and every service of a process, with a Watch that reports each change.

Starts as NOT_SERVING; `set_serving` may be called from the event loop at any time and returns at once.

"liveness" is no service but a question of its own, for who would restart the process: a worker that drains, or a
gateway without workers, takes nothing new and is to live on all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import NotFoundError

Context = grpc.aio.ServicerContext[Any, Any]
LIVENESS = "liveness"


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # generated without types
    """The health of all services of one process: they serve, or not, together."""

    def __init__(self) -> None:
        """Knows "" until services are added."""
        self.services: set[str] = {""}
        self.serving = False
        self.alive: Callable[[], bool] = lambda: True
        """What "liveness" says; asked each time."""
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Changes the status of every service and wakes all watchers."""
        if serving == self.serving:
            return
        self.serving = serving
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, service: str) -> Any:
        response = health_pb2.HealthCheckResponse
        if service != LIVENESS and service not in self.services:
            return response.SERVICE_UNKNOWN
        good = self.alive() if service == LIVENESS else self.serving
        return response.SERVING if good else response.NOT_SERVING

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        """The status now; NOT_FOUND for a service that isn't here, as the protocol says."""
        status = self._status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFoundError(f"no service {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: N802
        """The status now and after every change of `serving`, until the caller goes."""
        last = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            await changed.wait()
