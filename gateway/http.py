"""/metrics, /healthz and /workers over HTTP/1.1, one short answer per connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from tandem.errors import ConfigError
from tandem.service import address as addresses

MAX_HEAD_BYTES = 8192
MAX_CONNECTIONS = 64
PATIENCE = 5.0
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


class HttpServer:
    """Made -> `start()` -> `close()`. A client that says nothing is cut off after five seconds."""

    def __init__(
        self,
        listen: str,
        registry: CollectorRegistry,
        serving: Callable[[], bool],
        workers: Callable[[], list[dict[str, str | int]]],
    ) -> None:
        """`listen` is HOST:PORT, port 0 for any; `workers` gives what /workers lists. Raises ConfigError."""
        self._listen = addresses.parse(listen, flag="--http")
        self._registry, self._serving, self._workers = registry, serving, workers
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self) -> str:
        """Binds; returns HOST:PORT. Raises ConfigError when the port is taken."""
        try:
            self._server = await asyncio.start_server(
                self._answer, self._listen.host, self._listen.port, limit=MAX_HEAD_BYTES
            )
        except OSError as exc:
            raise ConfigError(f"--http: can't listen on {self._listen}: {exc.strerror or exc}") from exc
        return str(self._listen.with_port(self._server.sockets[0].getsockname()[1]))

    async def close(self) -> None:
        """Stops listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open > MAX_CONNECTIONS:
                return
            with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                async with asyncio.timeout(PATIENCE):
                    head = await reader.readuntil(b"\r\n\r\n")
                    status, kind, body = self._respond(head.split(b"\r\n", 1)[0].decode("latin-1"))
                    writer.write(_head(status, kind, len(body)))
                    if not head.startswith(b"HEAD "):
                        writer.write(body)
                    await writer.drain()
        finally:
            self._open -= 1
            writer.close()

    def _respond(self, request_line: str) -> tuple[int, str, bytes]:
        method, _, rest = request_line.partition(" ")
        target, _, version = rest.partition(" ")
        if not version.startswith("HTTP/1."):
            return 400, "text/plain", b"bad request\n"
        if method not in ("GET", "HEAD"):
            return 405, "text/plain", b"only GET and HEAD\n"
        path = target.partition("?")[0]
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        if path == "/healthz":
            return (200, "text/plain", b"ok\n") if self._serving() else (503, "text/plain", b"no worker is ready\n")
        if path == "/workers":
            return 200, "application/json", json.dumps({"models": self._workers()}).encode() + b"\n"
        return 404, "text/plain", b"only /metrics, /healthz and /workers\n"


def _head(status: int, kind: str, length: int) -> bytes:
    return (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
        "Connection: close\r\n\r\n"
    ).encode()
