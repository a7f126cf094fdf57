"""How `tandem status` and `tandem scale` talk to a running `tandem up`: one JSON line each way over its Unix socket.

Request: {"command": "status"} or {"command": "scale", "role": "decode", "count": 2}. Answer: {"ok": true, ...} or
{"ok": false, "error": "..."}. The socket lies in a folder that only its owner can enter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError, TandemError, UnavailableError
from tandem.service.logging import get_logger
from tandem.supervisor.runtime import control_socket, runtime_folder

MAX_LINE_BYTES = 64 << 10
READ_SECONDS = 10.0

_log = get_logger(__name__)

Handle = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlServer:
    """Serves one socket. `start` -> `close`, which removes it."""

    def __init__(self, path: Path, handle: Handle) -> None:
        """`handle` answers a request; TandemErrors that it raises become errors of the answer."""
        self._path, self._handle = path, handle
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Binds; a dead socket of the same name is replaced."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, self._path, limit=MAX_LINE_BYTES)

    async def close(self) -> None:
        """Stops listening, removes the socket, and breaks off what is asked still: nobody scales what is stopping."""
        if self._server is None:
            return
        self._server.close()
        self._path.unlink(missing_ok=True)
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(READ_SECONDS):
                line = await reader.readline()
            answer = await self._answer(line)
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except (TimeoutError, ValueError, ConnectionError):
            pass  # a caller that says nothing, too much, or went away
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("not an object")
        except ValueError as exc:
            return {"ok": False, "error": f"not a request: {exc}"}
        try:
            return {"ok": True, **await self._handle(request)}
        except TandemError as exc:
            return {"ok": False, "error": exc.message}
        except asyncio.CancelledError:
            return {"ok": False, "error": "`tandem up` is stopping"}
        except Exception:
            _log.exception("control request failed")
            return {"ok": False, "error": "internal error; see the log of tandem up"}


def ask(ports: int | Sequence[int], request: dict[str, Any], timeout: float = 600.0) -> dict[str, Any]:
    """Sends one request to the `tandem up` whose first gateway listens on the port, or on one of `ports`: whoever names
    all gateways names that one, too. `timeout` in seconds. Raises UnavailableError when there is none.
    """
    tried = [ports] if isinstance(ports, int) else list(ports)
    for port in tried:
        try:
            answer = _exchange(control_socket(port), request, timeout)
        except (FileNotFoundError, ConnectionRefusedError):
            continue
        except (OSError, ValueError) as exc:
            raise UnavailableError(f"`tandem up` on port {port} gave no answer: {exc}") from exc
        if not answer.pop("ok"):
            raise ConfigError(str(answer.get("error")))
        return dict(answer)
    where = " or ".join(map(str, tried))
    raise UnavailableError(f"no `tandem up` of yours runs a gateway on port {where}{_others()}")


def _exchange(path: Path, request: dict[str, Any], timeout: float) -> Any:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(str(path))
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as stream:
            return json.loads(stream.readline())


def _others() -> str:
    ports = sorted(path.stem.removeprefix("gateway-") for path in runtime_folder().glob("gateway-*.sock"))
    return f"; running ones: {', '.join(f'--gateway 127.0.0.1:{port}' for port in ports)}" if ports else ""
