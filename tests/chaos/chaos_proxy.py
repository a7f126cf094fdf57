"""A TCP proxy on loopback that breaks the network between two processes on command.

Life cycle: `Proxy()` -> `await start()` gives its address -> `target` may be set and changed at any time -> faults ->
`await close()`. One proxy stands for one link: everything that goes through it meets the same fate.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable

CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: close sends RST."""


class Proxy:
    """Belongs to the event loop."""

    def __init__(self, target: str = "") -> None:
        """`target` is HOST:PORT; without one, connections are refused."""
        self.target = target
        self.address = ""
        self.bytes_per_second = 0.0
        """Of a slow link, each way; 0 for no bound."""
        self.corrupt: Callable[[bytes], bytes] | None = None
        """What becomes of bytes on their way to the target."""
        self.bytes_through = 0
        self._flows = asyncio.Event()
        self._flows.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Listens; HOST:PORT."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"
        return self.address

    async def close(self) -> None:
        """Ends everything."""
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def connections(self) -> int:
        """Open now."""
        return len(self._writers) // 2

    def cut(self) -> None:
        """Resets every connection; new ones are taken."""
        for writer in list(self._writers):
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def stall(self) -> None:
        """From now on nothing comes through, and nobody is told; new connections are taken and hear nothing."""
        self._flows.clear()

    def resume(self) -> None:
        """What was held up goes on."""
        self._flows.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await self._connect(reader, writer)
        except asyncio.CancelledError:
            return  # `close`; asyncio's streams would log a handler that was cancelled
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flows.wait()
        host, _, port = self.target.rpartition(":")
        try:
            back_reader, back = await asyncio.open_connection(host, int(port or 0))
        except OSError:
            return
        self._writers.add(back)
        try:
            with contextlib.suppress(OSError):
                await asyncio.gather(self._pump(reader, back, forward=True), self._pump(back_reader, writer))
        finally:
            self._writers.discard(back)
            back.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, forward: bool = False) -> None:
        while data := await reader.read(CHUNK):
            await self._flows.wait()
            if self.bytes_per_second:
                await asyncio.sleep(len(data) / self.bytes_per_second)
            if forward and self.corrupt is not None:
                data = self.corrupt(data)
            self.bytes_through += len(data)
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
