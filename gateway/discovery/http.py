"""As much of an HTTP/1.1 client as watching needs: one GET a connection, its body line by line as it comes.

A dependency for that (aiohttp, httpx, the Kubernetes client) would be larger than the gateway; http.client blocks, and
a watch that can't be cancelled holds up the gateway's end.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

CONNECT_SECONDS = 10.0
MAX_BODY_LINE = 64 << 20
"""Bytes: a list is one line."""
MAX_HEAD = 64 << 10
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A server that went without a word is found out in half a minute."""


class HttpProtocolError(OSError):
    """What came is not HTTP/1.1 as this client reads it, or more than it takes."""


class Response:
    """A status and a body that is yet to come."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        """`headers` by name in lower case."""
        self.status = status
        self._headers, self._reader = headers, reader

    async def lines(self) -> AsyncIterator[bytes]:
        """The body's lines without their ends; a last one without an end too. Raises OSError when it breaks off."""
        rest = bytearray()
        async for part in self._parts():
            start = len(rest)
            rest += part
            while (end := rest.find(b"\n", start)) >= 0:
                yield bytes(rest[:end])
                del rest[: end + 1]
                start = 0
            if len(rest) > MAX_BODY_LINE:
                raise HttpProtocolError(f"a line of more than {MAX_BODY_LINE} bytes")
        if rest:
            yield bytes(rest)

    async def body(self) -> bytes:
        """All of it, with lines that end in LF. Raises OSError."""
        return b"\n".join([line async for line in self.lines()])

    async def _parts(self) -> AsyncIterator[bytes]:
        if self._headers.get("transfer-encoding", "").lower() == "chunked":
            while size := _hexadecimal(await self._line()):
                yield await self._exactly(size)
                await self._line()
            return
        length = self._headers.get("content-length")
        left = int(length) if length is not None and length.isdigit() else None
        while left != 0:
            part = await self._reader.read(65536 if left is None else min(left, 65536))
            if not part:
                if left:
                    raise HttpProtocolError("the body broke off")
                return
            left = None if left is None else left - len(part)
            yield part

    async def _line(self) -> bytes:
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise HttpProtocolError("the body broke off")
        return line.strip()

    async def _exactly(self, size: int) -> bytes:
        if size > MAX_BODY_LINE:
            raise HttpProtocolError(f"a chunk of {size} bytes")
        try:
            return await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as exc:
            raise HttpProtocolError("the body broke off") from exc


@asynccontextmanager
async def get(
    host: str, port: int, target: str, headers: Mapping[str, str], tls: ssl.SSLContext | None = None
) -> AsyncIterator[Response]:
    """GET `target`; the connection ends with the block. In clear without `tls`. Raises OSError (TimeoutError too)."""
    async with asyncio.timeout(CONNECT_SECONDS):
        reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=MAX_HEAD)
    try:
        _keep_alive(writer)
        name = f"[{host}]" if ":" in host else host
        lines = {"Host": f"{name}:{port}", "Connection": "close", "Accept-Encoding": "identity", **headers}
        head = "".join(f"{key}: {value}\r\n" for key, value in lines.items())
        writer.write(f"GET {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1"))
        async with asyncio.timeout(CONNECT_SECONDS):
            await writer.drain()
            response = await _response(reader)
        yield response
    finally:
        writer.transport.abort()


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    if found is None:
        return
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        if hasattr(socket, option):
            found.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


async def _response(reader: asyncio.StreamReader) -> Response:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as exc:
        raise HttpProtocolError("no HTTP answer") from exc
    first, *rest = head.split("\r\n")
    version, _, status = first.partition(" ")
    if not version.startswith("HTTP/1.") or not status[:3].isdigit():
        raise HttpProtocolError(f"no HTTP answer: {first[:80]!r}")
    pairs = (line.partition(":") for line in rest if ":" in line)
    return Response(int(status[:3]), {name.strip().lower(): value.strip() for name, _, value in pairs}, reader)


def _hexadecimal(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError as exc:
        raise HttpProtocolError(f"no size of a chunk: {line[:20]!r}") from exc
