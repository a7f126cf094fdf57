"""The tool that breaks networks does what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from chaos_proxy import Proxy


@pytest.fixture
async def link() -> AsyncIterator[Proxy]:
    """A proxy before a server that echoes."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await proxy.start()
    yield proxy
    await proxy.close()
    server.close()


async def _open(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = proxy.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    return await reader.readexactly(len(data))


async def test_bytes_and_ends_pass(link: Proxy) -> None:
    reader, writer = await _open(link)
    assert await _said(reader, writer, b"x" * 200_000) == b"x" * 200_000
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    while link.connections:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def test_cut_resets_and_lets_new_ones_in(link: Proxy) -> None:
    reader, writer = await _open(link)
    await _said(reader, writer, b"hello")
    link.cut()
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    writer.close()
    reader, writer = await _open(link)
    assert await _said(reader, writer, b"again") == b"again"
    writer.close()


async def test_stall_holds_what_comes_and_loses_nothing(link: Proxy) -> None:
    reader, writer = await _open(link)
    await _said(reader, writer, b"hello")
    link.stall()
    answer = asyncio.create_task(_said(reader, writer, b"later"))
    other_reader, other = await _open(link)
    second = asyncio.create_task(_said(other_reader, other, b"new"))
    assert not (await asyncio.wait({answer, second}, timeout=0.1))[0]
    link.resume()
    assert (await answer, await second) == (b"later", b"new")
    writer.close()
    other.close()


async def test_corrupt_and_nobody_there(link: Proxy) -> None:
    link.corrupt = lambda data: data.replace(b"a", b"b")
    reader, writer = await _open(link)
    writer.write(b"aaa")
    assert await reader.readexactly(3) == b"bbb"
    writer.close()
    link.target = "127.0.0.1:9"
    reader, writer = await _open(link)
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()
